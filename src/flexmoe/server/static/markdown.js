/** Markdown that grows. Enters: the whole text so far, again and again. Leaves: elements, finished blocks made once. */

import { element } from "./dom.js";
import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const PATIENCE = 4; // drawing takes at most one part in so many of the time

const escape = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

// What a model writes as HTML is shown as it stands; an image becomes a link, since pictures are fetched from afar.
const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

const SAFE = {
  ALLOWED_TAGS:
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr input li ol p pre strong table tbody td th thead tr ul".split(
      " ",
    ),
  ALLOWED_ATTR: ["href", "align", "start", "type", "checked", "disabled"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** The text as elements in `root`. */
export class GrowingMarkdown {
  constructor(root) {
    this._root = root;
    this._done = 0; // characters of finished blocks
    this._open = []; // elements of the block that may still change
    this._text = "";
    this._frame = null;
    this._next = 0;
  }

  /** Show this text, which begins with the one before; at a later frame if the last one was long ago enough. */
  show(text) {
    this._text = text;
    this._frame ??= requestAnimationFrame(() => this._paint());
  }

  /** Show all of it now; no more follows. */
  finish() {
    cancelAnimationFrame(this._frame);
    this._draw();
  }

  _paint() {
    this._frame = null;
    if (performance.now() < this._next) {
      this._frame = requestAnimationFrame(() => this._paint());
      return;
    }
    const start = performance.now();
    this._draw();
    const end = performance.now();
    this._next = end + PATIENCE * (end - start);
  }

  /** Blocks before the last one cannot change any more. */
  _draw() {
    const blocks = marked.lexer(this._text.slice(this._done));
    for (const node of this._open) node.remove();
    this._open = [];
    blocks.forEach((block, place) => {
      const nodes = elementsOf(block);
      this._root.append(...nodes);
      if (place < blocks.length - 1) this._done += block.raw.length;
      else this._open = nodes;
    });
  }
}

function elementsOf(block) {
  const fragment = DOMPurify.sanitize(marked.parser([block]), SAFE);
  for (const pre of fragment.querySelectorAll("pre")) addCopy(pre);
  for (const wide of fragment.querySelectorAll("table")) wide.replaceWith(scroller(wide));
  return [...fragment.childNodes];
}

function addCopy(pre) {
  const text = pre.textContent;
  const button = element("button", { type: "button", className: "quiet copy" }, "Copy");
  button.addEventListener("click", () => copy(text, button));
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", "Code");
  pre.replaceWith(element("div", { className: "code" }, button, pre.cloneNode(true)));
}

function scroller(wide) {
  const box = element("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": "Table" });
  box.append(wide.cloneNode(true));
  return box;
}

/** Copy text; the button says whether it worked. */
export async function copy(text, button) {
  const name = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = name), 1500);
}
