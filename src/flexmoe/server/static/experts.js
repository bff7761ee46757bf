/** The Experts view: which experts each layer chooses, live; how evenly; and what that means for ranks. */

import { about } from "./about.js";
import { request } from "./api.js";
import { download, element, table } from "./dom.js";
import { HeatMap, legend } from "./heatmap.js";
import { live } from "./live.js";
import { loadsOfRanks, minus, plan, recent } from "./loads.js";
import { rate } from "./words.js";

/** Seconds between figures while this view is shown. */
export const interval = 0.1;

let view = null;

/** Called each time the view is shown. */
export async function show(root) {
  if (view !== null) return;
  const { experts } = await about();
  const head = element("div", { className: "page-head" }, element("h2", {}, "Experts"));
  root.replaceChildren(head);
  if (experts === null) {
    root.append(element("p", {}, "This model has no experts: every token takes the whole of each layer."));
    return;
  }
  view = new View(root, experts);
  view.take(live.experts);
  live.listen((figures) => {
    if (figures?.experts) view.take(figures.experts);
  });
  document.addEventListener("themechange", () => view.restyle());
}

class View {
  constructor(root, experts) {
    this._experts = experts;
    this._plan = plan(experts);
    this._paused = false;
    this._recent = null; // [layer][expert], a mean that forgets
    this._latest = null;
    this._baseline = null; // the recording at the time of "Start afresh"
    this.map = new HeatMap({
      layers: experts.layers,
      ...this._plan,
      describe: (row, column) => this._describe(row, column),
    });
    this._legend = legend();
    this._tables = element("div", {
      className: "scroller",
      tabIndex: 0,
      role: "region",
      "aria-label": "Figures by layer",
    });
    this._pause = element(
      "button",
      { type: "button", "aria-pressed": "false", onclick: () => this._togglePause() },
      "Pause",
    );
    this._which = element(
      "select",
      { id: "experts-which", onchange: () => this._draw() },
      element("option", { value: "recent" }, "the last few looks"),
      element("option", { value: "total" }, "all since the start"),
    );
    root.append(...this._parts());
  }

  _parts() {
    const { top_k, num_experts } = this._experts;
    const button = (name, work) => element("button", { type: "button", onclick: work }, name);
    return [
      element(
        "p",
        { className: "note" },
        `Each token takes ${top_k} of ${num_experts} experts in every layer. A row is a layer, a column an expert; ` +
          "the colour says how many tokens chose it, beside the mean of its layer. " +
          "The server looks at a few steps at a time, and that costs it 1 % at most.",
      ),
      element(
        "div",
        { className: "row" },
        element("label", { for: "experts-which" }, "Show"),
        this._which,
        this._pause,
        button("Download recording", () => this._save()),
        button("Start recording afresh", () => this._restart()),
      ),
      this._ranksNote(),
      this.map.canvas,
      this.map.told,
      this._legend,
      this._tables,
    ];
  }

  _ranksNote() {
    const { ranks } = this._plan;
    const text =
      ranks === null
        ? "All experts are in one place: this server runs on one rank."
        : `Experts are spread over ${ranks} ranks; lines in the map part those of layer ` +
          `${this._experts.layers[0]}, the table has the load of each rank.`;
    return element("p", { className: "note" }, text);
  }

  take(layers) {
    if (this._paused || layers.length === 0) return;
    this._latest = layers;
    this._recent = recent(this._recent, layers);
    this._draw();
  }

  restyle() {
    const fresh = legend();
    this._legend.replaceWith(fresh);
    this._legend = fresh;
    this.map.draw();
  }

  _loads() {
    const counts = this._which.value === "total" ? this._latest.map(({ total }) => total) : this._recent;
    return counts.map((row) => {
      const mean = row.reduce((sum, value) => sum + value, 0) / row.length || 1;
      return row.map((value) => value / mean);
    });
  }

  _draw() {
    if (this._latest === null) return;
    const loads = this._loads();
    this.map.show(loads.map((row) => this._plan.order.map((expert) => row[expert])));
    this._tables.replaceChildren(this._table(loads));
  }

  _table(loads) {
    const { ranks } = this._plan;
    const heads = ["Layer", "Busiest expert", "Imbalance", "Active experts a step"];
    for (let rank = 0; rank < (ranks ?? 0); rank += 1) heads.push(`Rank ${rank}`);
    const rows = loads.map((row, place) => {
      const most = Math.max(...row);
      const { layer, active } = this._latest[place];
      const shares =
        ranks === null
          ? []
          : loadsOfRanks(row, this._experts.placements[place]).map((share) => `${rate(share)}×`);
      return [String(layer), String(row.indexOf(most)), `${most.toFixed(2)}×`, active.toFixed(1), ...shares];
    });
    return table("Load of the experts, layer by layer", heads, rows);
  }

  _describe(row, column) {
    const expert = this._plan.order[column];
    const place = `Layer ${this._experts.layers[row]}, expert ${expert}`;
    if (this._latest === null) return `${place}: nothing seen yet.`;
    const load = this._loads()[row][expert].toFixed(2);
    const total = this._latest[row].total[expert].toLocaleString("en");
    return `${place}: ${load} times the mean of the layer; ${total} tokens since the start.`;
  }

  _togglePause() {
    this._paused = !this._paused;
    this._pause.setAttribute("aria-pressed", String(this._paused));
    this._pause.textContent = this._paused ? "Go on" : "Pause";
  }

  async _save() {
    const text = await recording();
    download("routing.jsonl", minus(text, this._baseline), "application/jsonl");
  }

  async _restart() {
    this._baseline = await recording();
  }
}

const recording = async () => (await request("v1/flexmoe/routing")).text();
