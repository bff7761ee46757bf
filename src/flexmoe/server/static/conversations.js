/** The list of conversations at the side, with export and import. */

import { announce, byId, download, element } from "./dom.js";
import * as store from "./store.js";

export class Conversations {
  /** open(conversation), forget(id): what the chat does then. */
  constructor({ open, forget }) {
    this._open = open;
    this._forget = forget;
    byId("export").addEventListener("click", async () =>
      download("conversations.json", await store.exported()),
    );
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this._import(event.target));
    byId("show-conversations").addEventListener("click", () => this._fold());
  }

  /** Read the list anew. current: the one that is shown. */
  async refresh(current) {
    const rows = (await store.all()).map((conversation) => this._row(conversation));
    byId("conversation-list").replaceChildren(...rows);
    this._current(current);
  }

  /** Another one is shown now. */
  mark(id) {
    this._fold(false);
    this.refresh(id);
  }

  _current(id) {
    for (const row of byId("conversation-list").children) {
      if (row.dataset.id === id) row.firstChild.setAttribute("aria-current", "true");
    }
  }

  _row(conversation) {
    const open = element(
      "button",
      { type: "button", onclick: () => this._open(conversation) },
      conversation.title,
    );
    const remove = element(
      "button",
      {
        type: "button",
        className: "quiet",
        "aria-label": `Delete ${conversation.title}`,
        onclick: () => this._remove(conversation),
      },
      "×",
    );
    return element("li", { dataset: { id: conversation.id } }, open, remove);
  }

  async _remove(conversation) {
    await store.remove(conversation.id);
    this._forget(conversation.id);
    await this.refresh();
  }

  async _import(field) {
    let told;
    try {
      told = `${await store.imported(await field.files[0].text())} conversations taken in.`;
    } catch (error) {
      told = error.message;
      alert(told);
    }
    field.value = "";
    announce(told);
    await this.refresh();
  }

  /** On a narrow screen the list is folded away. */
  _fold(wanted) {
    const button = byId("show-conversations");
    const open = wanted ?? button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    byId("conversations").classList.toggle("open", open);
  }
}
