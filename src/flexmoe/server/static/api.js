/** Requests to the server that this page came from, with its key if it asks for one. */

import { byId } from "./dom.js";

const KEY = "flexmoe.key";

/** What went wrong, as a sentence for people. status: of the answer, 0 if there was none. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The answer to a request. body: sent as JSON, with POST. Throws ApiError; asks for a key where one is missing. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const response = await send(path, body, signal);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || !(await askForKey())) throw error;
  }
}

/** The JSON of an answer. */
export const getJson = async (path, options) => (await request(path, options)).json();

async function send(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  try {
    return await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached; it may have stopped, or the connection is gone.", 0);
  }
}

async function errorOf(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = sentence((await response.json()).error.message);
  } catch {
    // No error object: the status says all there is.
  }
  return new ApiError(message, response.status);
}

/** A message of the server as a sentence. */
export function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

let asking = null;

/** Whether the user gave a key. Several requests that need one ask once. */
function askForKey() {
  asking ??= dialog().finally(() => (asking = null));
  return asking;
}

function dialog() {
  const box = byId("key-dialog");
  const field = byId("key");
  byId("key-reason").textContent = sessionStorage.getItem(KEY)
    ? "The key that you gave was not accepted."
    : "";
  field.value = "";
  byId("key-cancel").onclick = () => box.close("cancel");
  box.returnValue = "cancel";
  box.showModal();
  return new Promise((resolve) => {
    box.onclose = () => {
      const given = box.returnValue !== "cancel" && field.value.trim() !== "";
      if (given) {
        sessionStorage.setItem(KEY, field.value.trim());
        document.dispatchEvent(new Event("keychange"));
      }
      resolve(given);
    };
  });
}
