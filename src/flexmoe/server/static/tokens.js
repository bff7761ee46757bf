/** An answer token by token: each one, when pointed at or reached by arrow keys, shows which experts it took. */

import { element } from "./dom.js";
import { percent } from "./words.js";

/** routing: {layers: numbers of the MoE layers, tokens: [{token, experts, weights}]}, experts and weights by layer. */
export function tokenView({ layers, tokens }) {
  const panel = element("div", { className: "experts-of-token", "aria-live": "polite" });
  const list = element("div", { className: "tokens", role: "listbox", "aria-label": "Tokens of the answer" });
  list.append(...tokens.map(option));
  if (list.firstChild) list.firstChild.tabIndex = 0;

  let chosen = null;
  const choose = (node) => {
    if (node === chosen || !node?.classList.contains("token")) return;
    chosen?.setAttribute("aria-selected", "false");
    if (chosen) chosen.tabIndex = -1;
    chosen = node;
    node.setAttribute("aria-selected", "true");
    node.tabIndex = 0;
    panel.replaceChildren(...details(layers, tokens[Number(node.dataset.place)]));
  };
  list.addEventListener("pointerover", (event) => choose(event.target));
  list.addEventListener("focusin", (event) => choose(event.target));
  list.addEventListener("keydown", (event) => {
    const next = neighbour(event);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  panel.append(
    element("p", { className: "note" }, "Point at a token, or walk through them with the arrow keys."),
  );
  return element("div", { className: "token-view" }, list, panel);
}

function option({ token }, place) {
  const properties = {
    className: "token",
    role: "option",
    tabIndex: -1,
    dataset: { place },
    "aria-selected": "false",
  };
  return element("span", properties, visible(token));
}

/** A token of white space, too, must be seen and be reached. */
const visible = (token) => token.replace(/\n/g, "⏎").replace(/^ /, "\u00a0") || "∅";

function neighbour({ key, target }) {
  if (key === "ArrowRight" || key === "ArrowDown") return target.nextElementSibling;
  if (key === "ArrowLeft" || key === "ArrowUp") return target.previousElementSibling;
  if (key === "Home") return target.parentElement.firstElementChild;
  return key === "End" ? target.parentElement.lastElementChild : null;
}

function details(layers, { token, experts, weights }) {
  const head = element("p", {}, "Experts behind ", element("code", {}, visible(token)));
  const rows = layers.map((layer, row) => {
    const chips = experts[row].map((expert, place) => chip(expert, weights[row][place]));
    return element("tr", {}, element("th", { scope: "row" }, `Layer ${layer}`), element("td", {}, ...chips));
  });
  return [head, element("table", {}, element("tbody", {}, ...rows))];
}

function chip(expert, weight) {
  const node = element("span", { className: "chip" }, `${expert} `, element("small", {}, percent(weight)));
  node.style.setProperty("--share", `${Math.round(100 * Math.min(1, Math.max(0, weight)))}%`);
  return node;
}
