/** Server-sent events of a fetched answer. Enters: a Response. Leaves: {name, data} one by one; data is parsed JSON. */

import { ApiError, sentence } from "./api.js";

const SLICE = 20; // ms of work after which the page gets its turn

/** Ends with [DONE] or with the answer. Throws ApiError for an event that is an error, and if the connection breaks. */
export async function* events(response) {
  let since = performance.now();
  for await (const block of blocks(response)) {
    if (performance.now() - since > SLICE) {
      await new Promise((resolve) => setTimeout(resolve));
      since = performance.now();
    }
    const event = read(block);
    if (event.text === "[DONE]") return;
    if (event.text === "") continue;
    const data = JSON.parse(event.text);
    if (data.error) throw new ApiError(sentence(data.error.message), 200);
    yield { name: event.name, data };
  }
}

async function* blocks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server broke before the answer was complete.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function read(block) {
  let name = "message";
  const lines = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) lines.push(line.slice(5).trimStart());
  }
  return { name, text: lines.join("\n") };
}
