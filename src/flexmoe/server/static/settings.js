/** The system prompt and the sampling controls of a conversation. Enters: its settings. Leaves: fields of a request. */

import { element } from "./dom.js";

// name: as the API has it. empty: what the server does if the field is left empty.
const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, empty: "1" },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, empty: "1" },
  { name: "top_k", label: "Top-k", min: 0, step: 1, empty: "all" },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, empty: "0" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.1, max: 3, step: 0.05, empty: "1" },
  { name: "max_tokens", label: "Most tokens", min: 1, step: 1, empty: "no limit" },
  { name: "seed", label: "Seed", step: 1, empty: "random" },
];

/** The controls, showing these settings and writing into them. changed: called after each change. */
export function controls(settings, changed) {
  const system = element("textarea", { id: "system", rows: 2, value: settings.system ?? "" });
  system.addEventListener("input", () => store(settings, "system", system.value, changed));
  const stop = element("input", { id: "stop-string", value: settings.stop ?? "", placeholder: "none" });
  stop.addEventListener("input", () => store(settings, "stop", stop.value, changed));
  return [
    labelled("System prompt", system, "wide"),
    ...NUMBERS.map((about) => number(about, settings, changed)),
    labelled("Stop at", stop),
  ];
}

function number({ name, label, empty, ...limits }, settings, changed) {
  const properties = { id: `set-${name}`, type: "number", placeholder: empty, ...limits };
  const field = element("input", { ...properties, value: settings[name] ?? "" });
  field.addEventListener("input", () => store(settings, name, field.valueAsNumber, changed));
  return labelled(label, field);
}

function labelled(text, field, kind = "") {
  return element("div", { className: `field ${kind}` }, element("label", { for: field.id }, text), field);
}

function store(settings, name, value, changed) {
  if (value === "" || Number.isNaN(value)) delete settings[name];
  else settings[name] = value;
  changed();
}

/** The request for the next turn of a conversation. */
export function requestOf({ settings, messages }) {
  const { system, stop, ...sampling } = settings;
  const said = messages.filter(({ content }) => content !== ""); // an answer that failed said nothing
  const turns = said.map(({ role, content }) => ({ role, content }));
  if (system) turns.unshift({ role: "system", content: system });
  return { messages: turns, ...sampling, ...(stop ? { stop } : {}) };
}
