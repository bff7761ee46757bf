/** The Chat view: conversations, and answers as they come. */

import { about } from "./about.js";
import { ask, STREAMED } from "./answer.js";
import { Conversations } from "./conversations.js";
import { announce, byId } from "./dom.js";
import { Turn } from "./message.js";
import { controls, requestOf } from "./settings.js";
import * as store from "./store.js";

const SPEAK_EVERY = 5000; // ms between pieces of an answer that screen readers are told
const NEAR_END = 80; // pixels from the end of the log within which it follows what is written

let current = null; // the conversation that is shown
let running = null; // AbortController of the answer that is on its way
let conversations = null;
let following = true; // whether the end of the log is in sight
let frame = null;

/** Called each time the view is shown. */
export async function show() {
  if (conversations === null) {
    conversations = new Conversations({ open, forget });
    connect();
    open((await store.all())[0] ?? store.fresh({ temperature: 0.7, max_tokens: 512 }));
  }
}

function connect() {
  const prompt = byId("prompt");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (prompt.value.trim() && running === null) say(prompt.value.trim());
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  byId("log").addEventListener("scroll", ({ target }) => {
    following = target.scrollHeight - target.scrollTop - target.clientHeight < NEAR_END;
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new-chat").addEventListener("click", () => open(store.fresh(current.settings)));
}

/** Before the first message: who answers, and what there is to see. */
function welcome() {
  const note = byId("welcome");
  note.hidden = true;
  if (current.messages.length > 0) return;
  const show = ({ model, experts }) => {
    const more = experts ? " Tick “Experts of each token” to see which experts were behind each word." : "";
    note.textContent = `“${model}” answers here.${more}`;
    note.hidden = current.messages.length > 0;
  };
  about().then(show, () => {}); // where the server is away, the bar at the top says so
}

/** Show a conversation. */
function open(conversation) {
  running?.abort();
  current = conversation;
  byId("chat-title").textContent = current.title;
  byId("settings-form").replaceChildren(...controls(current.settings, keep));
  draw();
  conversations.mark(current.id);
  byId("prompt").focus({ preventScroll: true });
}

function forget(id) {
  if (id === current.id) open(store.fresh(current.settings));
}

function draw() {
  byId("log").replaceChildren(
    ...current.messages.map((message, place) => turn(message, place).complete().root),
  );
  welcome();
  follow(true);
}

function turn(message, place) {
  const actions = {};
  if (message.role === "user") actions.edit = (text) => rewrite(place, text);
  else actions.regenerate = () => rewrite(place);
  return new Turn(message, actions);
}

/** Go on from before a message, with another text if it is the user's. */
function rewrite(place, text) {
  if (running !== null) return;
  current.messages.length = place;
  draw();
  if (text === undefined) answer();
  else say(text);
}

function say(text) {
  const message = { role: "user", content: text };
  if (current.messages.length === 0) current.title = text.slice(0, 60);
  current.messages.push(message);
  byId("chat-title").textContent = current.title;
  byId("prompt").value = "";
  welcome();
  byId("log").append(turn(message, current.messages.length - 1).complete().root);
  answer();
}

/** Ask for the next turn, and show it as it comes. */
async function answer() {
  const conversation = current;
  const withRouting = byId("want-routing").checked;
  const message = { role: "assistant", content: "" };
  const body = { ...requestOf(conversation), ...STREAMED, ...(withRouting ? { return_routing: true } : {}) };
  conversation.messages.push(message);
  const shown = turn(message, conversation.messages.length - 1);
  const speaker = new Speaker();
  byId("log").append(shown.root);
  busy(new AbortController());
  follow(true);
  const on = {
    text(text) {
      shown.grow(text);
      speaker.hear(text);
      follow();
    },
    routing: ({ layers, tokens }) => addRouting(message, layers, tokens),
  };
  const { text, error, ...stats } = await ask("v1/chat/completions", body, { signal: running.signal, on });
  Object.assign(message, {
    content: text,
    stats: stats.tokens ? { ...stats, withRouting } : undefined,
    error,
  });
  shown.complete();
  speaker.end(error ?? text);
  busy(null);
  follow();
  await keep(conversation);
}

function addRouting(message, layers, tokens) {
  message.routing ??= { layers, tokens: [] };
  message.routing.tokens.push(...tokens);
}

function busy(controller) {
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  byId("log").setAttribute("aria-busy", String(controller !== null));
}

/** Keep the end in sight at the next frame, unless the reader has scrolled away from it. */
function follow(always = false) {
  if (always) following = true;
  frame ??= requestAnimationFrame(() => {
    frame = null;
    if (following) byId("log").scrollTop = byId("log").scrollHeight;
  });
}

async function keep(conversation = current) {
  if (conversation.messages.length === 0) return;
  conversation.changed = Date.now();
  await store.put(conversation);
  await conversations.refresh(current.id);
}

/** Reads an answer out to screen readers, some of it at a time. */
class Speaker {
  constructor() {
    this._said = 0;
    this._next = performance.now() + SPEAK_EVERY;
    announce("The answer begins.");
  }

  hear(text) {
    if (performance.now() < this._next) return;
    const end = Math.max(text.lastIndexOf(". "), text.lastIndexOf("\n"));
    if (end <= this._said) return;
    announce(text.slice(this._said, end + 1));
    this._said = end + 1;
    this._next = performance.now() + SPEAK_EVERY;
  }

  end(text) {
    announce(`${text.slice(this._said)} End of the answer.`);
  }
}
