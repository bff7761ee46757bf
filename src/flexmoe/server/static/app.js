/** The page: which view is shown, the theme, and whether the server is there. Each view is a module of its own. */

import { byId, element } from "./dom.js";
import { live } from "./live.js";

const VIEWS = {
  chat: () => import("./chat.js"),
  compare: () => import("./compare.js"),
  experts: () => import("./experts.js"),
  engine: () => import("./engine.js"),
};
const THEMES = ["system", "light", "dark"];
const STATES = {
  connecting: "Connecting …",
  ok: "Connected",
  away: "Server away, trying again",
  locked: "Key needed",
};

let shown = null;

/** Show the view that the address names; its module is loaded at its first time. */
async function show() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat";
  const module = await VIEWS[name]();
  shown?.hide?.();
  for (const key of Object.keys(VIEWS)) byId(`view-${key}`).hidden = key !== name;
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `FlexMoE · ${name.charAt(0).toUpperCase()}${name.slice(1)}`;
  shown = module;
  live.want(module.interval ?? null);
  try {
    await module.show(byId(`view-${name}`));
  } catch (error) {
    byId(`view-${name}`).replaceChildren(
      element("p", { className: "problem", role: "alert" }, error.message),
    );
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("flexmoe.theme", theme);
  document.dispatchEvent(new Event("themechange"));
}

function nextTheme() {
  const place = THEMES.indexOf(document.documentElement.dataset.theme);
  setTheme(THEMES[(place + 1) % THEMES.length]);
}

live.listen(() => {
  const status = byId("status");
  if (status.dataset.state === live.state) return;
  status.dataset.state = live.state;
  status.textContent = STATES[live.state];
});

setTheme(localStorage.getItem("flexmoe.theme") ?? "system");
byId("theme").addEventListener("click", nextTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  document.dispatchEvent(new Event("themechange")),
);
addEventListener("hashchange", show);
// Only a page whose view has come may say that it is connected: until then nothing hears what is typed.
show().finally(() => live.run());
