/** Lines over time (uPlot). Enters: times and values. */

import { element } from "./dom.js";
import uPlot from "./vendor/uplot.js";

const HEIGHT = 170;
const WHOLE = [1, 2, 5].flatMap((step) => [step, 10 * step, 100 * step, 1000 * step]).sort((a, b) => a - b);
const COLOURS = ["--accent", "--warm", "--muted"];

export class Chart {
  /** names: one a line. words: how a value is written. whole: values are counts, so the axis has no fractions. */
  constructor(title, names, words, whole = false) {
    Object.assign(this, { title, names, words, whole });
    this._data = [[], ...names.map(() => [])];
    this._box = element("div", {});
    this.root = element("figure", { className: "chart" }, element("figcaption", {}, title), this._box);
    new ResizeObserver(() => this._resize()).observe(this.root);
    document.addEventListener("themechange", () => this._make());
  }

  /** Show these values; data: [times, line, line, ...]. */
  show(data) {
    this._data = data;
    this._plot?.setData(data);
  }

  _resize() {
    const width = this.root.clientWidth;
    if (width === 0) return;
    if (this._plot) this._plot.setSize({ width, height: HEIGHT });
    else this._make();
  }

  /** Anew, since uPlot takes its colours when it is made. */
  _make() {
    const width = this.root.clientWidth;
    if (width === 0) return;
    this._plot?.destroy();
    const style = getComputedStyle(this.root);
    const clock = (_, times) =>
      times.map((time) => new Date(1000 * time).toLocaleTimeString("en", { hour12: false }));
    const grid = {
      stroke: style.getPropertyValue("color"),
      grid: { stroke: style.borderTopColor, width: 1 },
      ticks: { show: false },
    };
    const words = (_, values) => values.map(this.words);
    const options = {
      width,
      height: HEIGHT,
      cursor: { y: false },
      axes: [
        { ...grid, size: 30, space: 90, values: clock },
        { ...grid, size: 70, values: words, ...(this.whole ? { incrs: WHOLE } : {}) },
      ],
      scales: { y: { range: (_, low, high) => [0, Math.max(high * 1.1, this.whole ? 2 : 1e-4)] } },
      series: [
        { label: "at", value: (_, time) => (time === null ? "–" : clock(_, [time])[0]) },
        ...this.names.map((label, place) => this._line(label, place, style)),
      ],
    };
    this._plot = new uPlot(options, this._data, this._box);
  }

  _line(label, place, style) {
    this._box.style.color = style.getPropertyValue(COLOURS[place]);
    const stroke = getComputedStyle(this._box).color; // light-dark() becomes a colour only where it is used
    this._box.style.color = "";
    return {
      label,
      stroke,
      width: 1.5,
      points: { show: false },
      value: (_, value) => (value === null ? "–" : this.words(value)),
    };
  }
}
