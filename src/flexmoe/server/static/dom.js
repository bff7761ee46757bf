/** Making elements. What enters as text stays text: nothing here reads HTML. */

/** An element with properties and children. `dataset`, `aria-*` and `role` are attributes, `on*` are listeners. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) set(node, name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function set(node, name, value) {
  if (name === "dataset") Object.assign(node.dataset, value);
  else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
  else if (name.startsWith("aria-") || name === "role" || name === "for") node.setAttribute(name, value);
  else node[name] = value;
}

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A table: a caption for those who do not see it, column heads, rows of values. The first value heads its row. */
export function table(caption, heads, rows) {
  const cell = (value, place) => (place ? element("td", {}, value) : element("th", { scope: "row" }, value));
  return element(
    "table",
    {},
    element("caption", { className: "hidden" }, caption),
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))),
  );
}

/** Offer text as a file. */
export function download(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Tell screen readers something, once they have finished what they say. */
export function announce(text) {
  byId("announcer").textContent = text;
}
