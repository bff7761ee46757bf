/** The Compare view: one prompt to two engines, with times, memory and where their texts part. */

import { about } from "./about.js";
import { ask, STREAMED } from "./answer.js";
import { firstDifference, rows } from "./comparison.js";
import { announce, download, element, table } from "./dom.js";
import { live } from "./live.js";
import { rate } from "./words.js";

const OURS = "FlexMoE";
const START = "What is the capital of Norway?";
// Another prompt: the prefix cache shall not know the one that is timed.
const WARM_UP = { messages: [{ role: "user", content: "Hello" }], max_tokens: 2 };

let parts = null; // the elements of the view
let running = null; // AbortController while a comparison runs
let result = null; // the last one, as it is saved

/** Called each time the view is shown. */
export async function show(root) {
  if (parts !== null) return;
  const { compare, engine } = await about();
  root.replaceChildren(element("div", { className: "page-head" }, element("h2", {}, "Compare")));
  if (compare === null) root.append(...howTo());
  else build(root, compare, engine);
}

function howTo() {
  const line = (text) => element("pre", {}, element("code", {}, text));
  return [
    element("p", {}, "This server has nothing to compare with yet. Start it with one of"),
    line("flexmoe serve --compare hf"),
    line("flexmoe serve --compare http://127.0.0.1:9000/v1"),
    element(
      "p",
      { className: "note" },
      "The first runs Hugging Face transformers' plain generate on the same weights, in a process of its own; " +
        "the second asks any server with OpenAI's API.",
    ),
  ];
}

function build(root, compare, engine) {
  const prompt = element("textarea", { id: "compare-prompt", rows: 3, value: START });
  const most = element("input", { id: "compare-tokens", type: "number", min: 1, value: 128 });
  const mode = element(
    "select",
    { id: "compare-mode" },
    element("option", { value: "turns" }, "one after the other"),
    element("option", { value: "together" }, "both at once"),
  );
  const long = check(compare);
  const start = element("button", { type: "submit", className: "main" }, "Compare");
  const stop = element("button", { type: "button", hidden: true, onclick: () => running?.abort() }, "Stop");
  const save = element("button", { type: "button", hidden: true, onclick: saveResult }, "Save as JSON");
  const form = element(
    "form",
    { className: "compare-form" },
    field("Prompt", prompt, "wide"),
    field("Most tokens", most),
    field("Engines answer", mode),
    long.label,
    element("div", { className: "row" }, start, stop, save),
  );
  const note = element("p", { className: "note", id: "compare-note" });
  const figures = element("div", {
    className: "scroller",
    id: "compare-figures",
    tabIndex: 0,
    role: "region",
    "aria-label": "Figures",
  });
  const sides = [OURS, compare.name].map(side);
  parts = { prompt, most, mode, long: long.box, start, stop, save, note, figures, sides, compare, engine };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running === null && prompt.value.trim()) run();
  });
  root.append(
    form,
    note,
    element("div", { className: "sides" }, ...sides.map(({ root: box }) => box)),
    figures,
  );
}

/** A box to tick. Both engines write as many tokens as they may, so that times are taken over equally many. */
function check(compare) {
  const box = element("input", { id: "compare-long", type: "checkbox", checked: compare.kind === "hf" });
  return {
    box,
    label: element("label", { className: "check" }, box, " Write on after the end, up to that many tokens"),
  };
}

const field = (label, control, kind = "") =>
  element("div", { className: `field ${kind}` }, element("label", { for: control.id }, label), control);

function side(name) {
  const text = element("div", { className: "side-text" });
  const state = element("p", { className: "note", role: "status" });
  return {
    name,
    text,
    state,
    root: element("section", { className: "side", "aria-label": name }, element("h3", {}, name), state, text),
  };
}

async function run() {
  const { prompt, most, mode, sides, note } = parts;
  const messages = [{ role: "user", content: prompt.value }];
  const question = { messages, max_tokens: most.valueAsNumber || 128, ignore_eos: parts.long.checked };
  const together = mode.value === "together";
  busy(new AbortController());
  for (const { text, state } of sides) [text.textContent, state.textContent] = ["", ""];
  parts.figures.replaceChildren();
  note.textContent = together
    ? "Both engines answer at once: they share the machine, so neither time is what it would be alone."
    : "The engines answer one after the other, each alone on the machine.";
  await warmUp();
  const answers = await (together ? bothAtOnce(question) : inTurns(question));
  if (answers.every(({ finish }) => finish === "stop" || finish === "length")) {
    tell(question, answers, together);
  }
  busy(null);
}

/** Answers that nobody times: whatever is done once, such as starting the other engine, is done then. */
async function warmUp() {
  await ours(WARM_UP);
  const { status } = options(parts.sides[1]).on;
  await ask("v1/flexmoe/compare", WARM_UP, { signal: running.signal, on: { status } });
}

async function bothAtOnce(question) {
  return Promise.all([ours(question, parts.sides[0]), theirs(question, parts.sides[1])]);
}

async function inTurns(question) {
  const first = await ours(question, parts.sides[0]);
  return [first, await theirs(question, parts.sides[1])];
}

async function ours(question, where) {
  const body = { ...question, ...STREAMED, temperature: 0 };
  const answer = await ask("v1/chat/completions", body, options(where));
  return finish(where, { ...answer, memory: ourMemory() });
}

async function theirs(question, where) {
  return finish(where, await ask("v1/flexmoe/compare", question, options(where)));
}

const STATES = {
  waiting: "Waiting for its turn",
  loading: "Starting, which takes some seconds the first time",
  ready: "Answering",
};

const options = (where) => ({
  signal: running.signal,
  on: where && {
    text: (text) => (where.text.textContent = text),
    status: ({ state }) => (where.state.textContent = STATES[state] ?? ""),
  },
});

function finish(where, answer) {
  if (where) where.state.textContent = answer.error ?? (answer.finish === "stopped" ? "Stopped" : "");
  return answer;
}

function ourMemory() {
  const { resident_bytes: resident, gpu_bytes: gpu } = live.history.at(-1)?.memory ?? {};
  return gpu ?? resident ?? null;
}

function busy(controller) {
  running = controller;
  parts.start.hidden = controller !== null;
  parts.stop.hidden = controller === null;
  parts.save.hidden = controller !== null || result === null;
}

/** The figures of both, and the place where their texts part. */
function tell(question, answers, together) {
  const [a, b] = answers;
  const place = firstDifference(a.text, b.text);
  mark(place, answers);
  const verdict = place === null ? "Both texts are equal." : `The texts part at character ${place + 1}.`;
  const faster = b.tpot && a.tpot ? `${OURS} is ${rate(b.tpot / a.tpot)} times as fast a token. ` : "";
  parts.note.textContent += ` ${faster}${verdict}${hint(place)}`;
  parts.figures.replaceChildren(
    table("Figures of both engines", ["", ...parts.sides.map(({ name }) => name), "ratio"], rows(a, b)),
  );
  result = {
    format: "flexmoe-comparison-1",
    time: new Date().toISOString(),
    mode: together ? "at once" : "one after the other",
    engine: parts.engine,
    compared_with: parts.compare.name,
    question,
    first_difference: place,
    answers: answers.map((answer, which) => ({ engine: parts.sides[which].name, ...answer })),
  };
  announce(`${faster}${verdict}`);
}

function hint(place) {
  const { compare, engine } = parts;
  if (place === null || compare.kind !== "hf") return "";
  return engine.dtype === "float32"
    ? ""
    : ` In ${engine.dtype} a near tie may fall either way; with --dtype float32 the texts are equal.`;
}

function mark(place, answers) {
  if (place === null) return;
  parts.sides.forEach(({ text }, which) => {
    const whole = answers[which].text;
    text.replaceChildren(whole.slice(0, place), element("mark", {}, whole.slice(place)));
  });
}

function saveResult() {
  download("comparison.json", JSON.stringify(result, null, 1));
}
