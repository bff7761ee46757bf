/** A heat map of layers × experts on a canvas. Enters: loads [layer][expert] as multiples of the mean. */

import { element } from "./dom.js";

const HOTTEST = 3; // times the mean at which the colour is full
const GAP = 1;
const SIDE = 34; // pixels at the left, for the numbers of the layers
const TOP = 18; // pixels at the top, for the numbers of the experts

/** Colours from idle by the mean to hot, for light and for dark. */
const SCALES = {
  light: [
    [240, 238, 231],
    [141, 198, 186],
    [27, 116, 103],
    [4, 40, 38],
  ],
  dark: [
    [33, 39, 42],
    [30, 92, 83],
    [88, 196, 177],
    [224, 252, 243],
  ],
};

export class HeatMap {
  /**
   * layers: their numbers. order: experts from left to right. boundaries: columns at which a rank begins.
   * describe(row, column): what a cell says in words.
   */
  constructor({ layers, order, boundaries, describe }) {
    Object.assign(this, { layers, order, boundaries });
    this._describe = describe;
    this._loads = layers.map(() => order.map(() => 0));
    this._cursor = null;
    this.told = element(
      "p",
      { className: "note heat-told", "aria-live": "polite" },
      "Point at a cell, or move among them with the arrow keys.",
    );
    this.canvas = element("canvas", {
      className: "heat",
      tabIndex: 0,
      role: "application",
      "aria-label": "Heat map of layers and experts; arrow keys move among its cells",
    });
    this.canvas.addEventListener("pointermove", (event) => this._point(event));
    this.canvas.addEventListener("keydown", (event) => this._move(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  /** Show these loads. */
  show(loads) {
    this._loads = loads;
    this._frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this._frame = null;
    const { canvas } = this;
    const width = canvas.clientWidth;
    if (width === 0) return;
    const height = TOP + this.layers.length * this._rowHeight();
    const density = devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = width * density;
    canvas.height = height * density;
    const pen = canvas.getContext("2d");
    pen.scale(density, density);
    this._drawHeads(pen);
    this._drawCells(pen);
  }

  _rowHeight() {
    return Math.max(8, Math.min(34, 520 / this.layers.length));
  }

  _cellWidth() {
    return (this.canvas.clientWidth - SIDE) / this.order.length;
  }

  _drawHeads(pen) {
    const style = getComputedStyle(this.canvas);
    pen.fillStyle = style.color;
    pen.font = `11px ${style.fontFamily}`;
    pen.textBaseline = "middle";
    const [wide, high] = [this._cellWidth(), this._rowHeight()];
    const everyColumn = Math.ceil(24 / wide);
    const everyRow = Math.ceil(14 / high);
    pen.textAlign = "center";
    this.order.forEach((expert, column) => {
      if (column % everyColumn === 0) pen.fillText(String(expert), SIDE + (column + 0.5) * wide, TOP / 2);
    });
    pen.textAlign = "right";
    this.layers.forEach((layer, row) => {
      if (row % everyRow === 0) pen.fillText(String(layer), SIDE - 8, TOP + (row + 0.5) * high);
    });
  }

  _drawCells(pen) {
    const scale = SCALES[isDark() ? "dark" : "light"];
    const [wide, high] = [this._cellWidth(), this._rowHeight()];
    this._loads.forEach((loads, row) =>
      loads.forEach((load, column) => {
        pen.fillStyle = colour(scale, load);
        pen.fillRect(SIDE + column * wide, TOP + row * high, Math.max(1, wide - GAP), high - GAP);
      }),
    );
    pen.fillStyle = pen.strokeStyle = getComputedStyle(this.canvas).color;
    for (const column of this.boundaries)
      pen.fillRect(SIDE + column * wide - 1.5, 2, 2, TOP + this.layers.length * high);
    if (this._cursor)
      pen.strokeRect(
        SIDE + this._cursor.column * wide,
        TOP + this._cursor.row * high,
        wide - GAP,
        high - GAP,
      );
  }

  _point({ offsetX, offsetY }) {
    const column = Math.floor((offsetX - SIDE) / this._cellWidth());
    const row = Math.floor((offsetY - TOP) / this._rowHeight());
    if (row >= 0 && row < this.layers.length && column >= 0 && column < this.order.length)
      this._tell({ row, column });
  }

  _move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const { row, column } = this._cursor ?? { row: 0, column: 0 };
    const within = (value, size) => Math.max(0, Math.min(size - 1, value));
    this._tell({
      row: within(row + step[0], this.layers.length),
      column: within(column + step[1], this.order.length),
    });
  }

  _tell(cursor) {
    if (this._cursor?.row === cursor.row && this._cursor.column === cursor.column) return;
    this._cursor = cursor;
    this.told.textContent = this._describe(cursor.row, cursor.column);
    this.show(this._loads);
  }
}

/** Whether dark colours are shown now. */
export function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
}

/** 0 is idle, 1 the mean, 3 and more hot. */
function colour(scale, load) {
  const place = load <= 1 ? load : 1 + (2 * (Math.min(load, HOTTEST) - 1)) / (HOTTEST - 1);
  const low = Math.min(scale.length - 2, Math.floor(place));
  const part = place - low;
  const mixed = scale[low].map((value, channel) =>
    Math.round(value + (scale[low + 1][channel] - value) * part),
  );
  return `rgb(${mixed.join(" ")})`;
}

/** The scale as a strip with words, for a legend. */
export function legend() {
  const canvas = element("canvas", { width: 120, height: 10, "aria-hidden": "true" });
  const pen = canvas.getContext("2d");
  for (let x = 0; x < 120; x += 1) {
    pen.fillStyle = colour(SCALES[isDark() ? "dark" : "light"], (HOTTEST * x) / 119);
    pen.fillRect(x, 0, 1, 10);
  }
  return element(
    "p",
    { className: "note legend" },
    "idle ",
    canvas,
    ` ${HOTTEST} times the mean of its layer, or more`,
  );
}
