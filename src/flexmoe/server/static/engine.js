/** The Engine view: what runs and waits, the cache, speed and latencies over time; plan and kernels in use. */

import { about } from "./about.js";
import { Chart } from "./charts.js";
import { element, table } from "./dom.js";
import { live } from "./live.js";
import { percentile } from "./percentiles.js";
import { bytes, count, percent, rate, seconds } from "./words.js";

/** Seconds between figures while this view is shown. */
export const interval = 0.5;

const WINDOW = 20; // seconds that a percentile looks back
const SHARES = [0.5, 0.9, 0.99];
const NAMES = ["half below", "90 % below", "99 % below"];

let parts = null;

/** Called each time the view is shown. */
export async function show(root) {
  if (parts !== null) return;
  parts = build(root, await about());
  live.listen((figures) => {
    if (figures !== null && !root.hidden) draw(figures);
  });
}

function build(root, told) {
  const cards = element("dl", { className: "cards" });
  const charts = {
    speed: new Chart("Tokens a second", ["generated", "of prompts"], rate),
    requests: new Chart("Samples", ["running", "waiting"], (value) => String(Math.round(value)), true),
    ttft: new Chart(`Time to first token, last ${WINDOW} s`, NAMES, seconds),
    itl: new Chart(`Time between tokens, last ${WINDOW} s`, NAMES, seconds),
  };
  document.head.append(element("link", { rel: "stylesheet", href: "static/vendor/uplot.css" }));
  root.replaceChildren(
    element(
      "div",
      { className: "page-head" },
      element("h2", {}, "Engine"),
      element("p", { className: "note" }, told.model),
    ),
    cards,
    element("div", { className: "charts" }, ...Object.values(charts).map(({ root: box }) => box)),
    element("h3", {}, "Kernels in use"),
    scroller(
      "Kernels in use",
      table("Kernels by operation", ["Operation", "Kernels"], Object.entries(told.kernels)),
    ),
    element("h3", {}, "Plan and options"),
    scroller(
      "Plan and options",
      table("What the engine runs with", ["Option", "Value"], options(told.engine)),
    ),
  );
  return { cards, charts, bounds: told.latency_bounds };
}

const scroller = (name, child) =>
  element("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": name }, child);

function options(engine) {
  const degrees = "tensor_parallel_size" in engine ? {} : { plan: "one rank" };
  return Object.entries({ ...degrees, ...engine }).map(([name, value]) => [
    name.replaceAll("_", " "),
    write(value),
  ]);
}

function write(value) {
  if (typeof value === "number") return value.toLocaleString("en");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function draw(figures) {
  const {
    requests,
    kv_cache: cache,
    prefix_cache: prefix,
    rates,
    tokens,
    memory,
    preemptions,
    steps,
  } = figures;
  const facts = [
    ["Running", count(requests.running, "sample")],
    ["Waiting", count(requests.waiting, "sample")],
    ["KV blocks in use", `${cache.used.toLocaleString("en")} of ${cache.blocks.toLocaleString("en")}`],
    ["Prompt tokens from the prefix cache", percent(prefix.hit_tokens / (prefix.queried_tokens || 1))],
    ["Speed", `${rate(rates.generated)} tokens/s`],
    ["Generated", count(tokens.generated, "token")],
    ["Steps, preemptions", `${steps.toLocaleString("en")}, ${preemptions.toLocaleString("en")}`],
    ["Memory", bytes(memory.gpu_bytes ?? memory.resident_bytes ?? NaN)],
  ];
  parts.cards.replaceChildren(
    ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
  chart();
}

function chart() {
  const { charts, bounds } = parts;
  const history = live.history.slice(-300);
  const times = history.map(({ time }) => time);
  charts.speed.show([
    times,
    history.map(({ rates }) => rates.generated),
    history.map(({ rates }) => rates.prompt),
  ]);
  charts.requests.show([
    times,
    history.map(({ requests }) => requests.running),
    history.map(({ requests }) => requests.waiting),
  ]);
  for (const kind of ["ttft", "itl"]) charts[kind].show([times, ...latencies(history, kind, bounds[kind])]);
}

/** A line for each share. */
function latencies(history, kind, bounds) {
  let first = 0;
  const lines = SHARES.map(() => []);
  for (const { time, latency } of history) {
    while (history[first].time < time - WINDOW) first += 1;
    const before = history[first].time < time ? history[first].latency[kind] : null;
    SHARES.forEach((share, line) =>
      lines[line].push(before && percentile(bounds, before, latency[kind], share)),
    );
  }
  return lines;
}
