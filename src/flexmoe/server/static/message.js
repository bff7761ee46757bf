/** One turn of a conversation as elements: what was said, its figures, and what can be done with it. */

import { element } from "./dom.js";
import { copy, GrowingMarkdown } from "./markdown.js";
import { tokenView } from "./tokens.js";
import { count, rate, seconds } from "./words.js";

/** A message with its buttons. actions: {edit(), regenerate()}, those that are possible. */
export class Turn {
  constructor(message, actions) {
    this._message = message;
    this._body = element("div", { className: "body" });
    this._stats = element("p", { className: "stats" });
    this._buttons = element("div", { className: "actions" });
    this._actions = actions;
    const name = message.role === "user" ? "You" : "Assistant";
    this.root = element(
      "article",
      { className: `turn ${message.role}`, "aria-label": name },
      element("h3", {}, name),
      this._body,
      this._stats,
      this._buttons,
    );
    if (message.role === "user") this._body.textContent = message.content;
    else this._markdown = new GrowingMarkdown(this._body);
  }

  /** More text of an answer that is on its way. */
  grow(text) {
    this._markdown.show(text);
  }

  /** The message is complete: all of it is shown, and its buttons. */
  complete() {
    const { role, content, stats, error } = this._message;
    if (role === "assistant") {
      this._markdown.show(content);
      this._markdown.finish();
    }
    if (stats) this._stats.textContent = figures(stats);
    if (error) this._body.append(element("p", { className: "problem", role: "alert" }, error));
    this._buttons.replaceChildren(...this._possible());
    return this;
  }

  _possible() {
    const button = (name, work) =>
      element("button", { type: "button", className: "quiet", onclick: work }, name);
    const found = [button("Copy", (event) => copy(this._message.content, event.target))];
    if (this._actions.edit) found.push(button("Edit", () => this._edit()));
    if (this._actions.regenerate) found.push(button("Regenerate", () => this._actions.regenerate()));
    if (this._message.routing) found.push(this._tokensButton());
    return found;
  }

  /** Shows the answer token by token instead, each with its experts. */
  _tokensButton() {
    const button = element(
      "button",
      { type: "button", className: "quiet", "aria-pressed": "false" },
      "Experts of tokens",
    );
    let view = null;
    button.addEventListener("click", () => {
      view ??= tokenView(this._message.routing);
      const pressed = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!pressed));
      this._body.hidden = !pressed;
      if (pressed) view.remove();
      else this._body.after(view);
    });
    return button;
  }

  _edit() {
    const field = element("textarea", {
      rows: 3,
      value: this._message.content,
      "aria-label": "Edit your message",
    });
    const save = element("button", { type: "submit", className: "main" }, "Send again");
    const cancel = element("button", { type: "button", className: "quiet" }, "Cancel");
    const form = element(
      "form",
      { className: "edit" },
      field,
      element("div", { className: "row" }, save, cancel),
    );
    const close = () => {
      form.replaceWith(this._body);
      this._buttons.hidden = false;
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this._actions.edit(field.value);
    });
    cancel.addEventListener("click", close);
    this._body.replaceWith(form);
    this._buttons.hidden = true;
    field.focus();
  }
}

function figures({ tokens, exact, ttft, tokensPerSecond, finish, withRouting }) {
  const parts = [exact ? count(tokens, "token") : `about ${count(tokens, "token")}`];
  if (tokensPerSecond !== null) parts.push(`${rate(tokensPerSecond)} tokens/s`);
  if (ttft !== null) parts.push(`first token after ${seconds(ttft)}`);
  if (finish === "length") parts.push("cut at the limit of tokens");
  if (finish === "stopped") parts.push("stopped by you");
  if (withRouting) parts.push("slower, as experts were noted");
  return parts.join(" · ");
}
