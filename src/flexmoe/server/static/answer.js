/** One streamed answer and its times. Enters: a request as chat completions take it. Leaves: text, times, tokens. */

import { request } from "./api.js";
import { events } from "./stream.js";

/** Fields of a chat completion that comes as a stream, with its number of tokens. */
export const STREAMED = { stream: true, stream_options: { include_usage: true } };

/**
 * Ask for a stream and read it to its end. on: {text(whole), routing(part), status(data)}, each called as things come.
 *
 * The clock starts with the request, or where the engine behind it has to be started first, once it is ready.
 */
export async function ask(path, body, { signal, on = {} }) {
  const answer = new Answer(on);
  try {
    const response = await request(path, { body, signal });
    for await (const event of events(response)) answer.take(event);
  } catch (error) {
    if (error.name !== "AbortError") answer.error = error.message;
    answer.finish ??= error.name === "AbortError" ? "stopped" : "error";
  }
  return answer.result();
}

class Answer {
  constructor(on) {
    this._on = on;
    this._start = performance.now();
    this._first = this._last = null;
    this._pieces = 0;
    this.text = "";
    this.usage = this.finish = this.error = this.memory = this.timings = null;
    this.routing = [];
  }

  take({ name, data }) {
    if (name === "status") this._status(data);
    else {
      this.usage = data.usage ?? this.usage;
      this.timings = data.timings ?? this.timings;
      const choice = data.choices?.[0];
      if (choice) this._choice(choice);
    }
  }

  _status(data) {
    this.memory = data.memory_bytes ?? this.memory;
    if (data.state === "ready") this._start = performance.now();
    this._on.status?.(data);
  }

  _choice(choice) {
    this.finish = choice.finish_reason ?? this.finish;
    if (choice.routing) {
      this.routing.push(...choice.routing.tokens);
      this._on.routing?.(choice.routing);
    }
    const piece = choice.delta?.content;
    if (!piece) return;
    this._last = performance.now();
    this._first ??= this._last;
    this._pieces += 1;
    this.text += piece;
    this._on.text?.(this.text);
  }

  /**
   * Times in seconds as the engine took them; where it tells none, as they came here, where several pieces may come
   * together.
   */
  _times(tokens) {
    if (this.timings !== null) return this.timings;
    const between = (this._last - this._first) / 1000;
    return {
      ttft: this._first === null ? null : (this._first - this._start) / 1000,
      tpot: tokens > 1 && between > 0 ? between / (tokens - 1) : null,
    };
  }

  /** Plain data. exact: tokens were counted by the server, not guessed from the pieces that came. */
  result() {
    const tokens = this.usage?.completion_tokens ?? (this.routing.length || this._pieces);
    const { ttft, tpot } = this._times(tokens);
    return {
      text: this.text,
      finish: this.finish,
      error: this.error,
      tokens,
      exact: this.usage !== null,
      promptTokens: this.usage?.prompt_tokens ?? null,
      cachedTokens: this.usage?.prompt_tokens_details?.cached_tokens ?? null,
      ttft,
      tpot,
      measuredBy: this.timings === null ? "page" : "engine",
      tokensPerSecond: tpot === null ? null : 1 / tpot,
      seconds: ((this._last ?? performance.now()) - this._start) / 1000,
      memory: this.memory,
    };
  }
}
