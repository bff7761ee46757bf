/** The server's live figures: one stream for the whole page, begun again when the server went away and came back. */

import { request } from "./api.js";
import { events } from "./stream.js";

const SLOW = 2; // seconds between figures while no view shows them
const FIRST_WAIT = 500; // ms until the first try to connect again; doubled up to LONGEST_WAIT
const LONGEST_WAIT = 4000;

class Live {
  constructor() {
    this.state = "connecting"; // then ok, away, or locked: no key
    this.history = []; // the latest figures, for charts; without experts, which are large
    this.experts = []; // of the server's latest look
    this._listeners = new Set();
    this._interval = SLOW;
    this._stop = new AbortController();
  }

  /** Call function with each event's figures, or with null when the state changes. */
  listen(listener) {
    this._listeners.add(listener);
  }

  /** How often figures are wanted now, in seconds; null: nobody looks. */
  want(interval) {
    const wanted = interval ?? SLOW;
    if (wanted === this._interval) return;
    this._interval = wanted;
    this._stop.abort();
  }

  /** Never returns. */
  async run() {
    let wait = FIRST_WAIT;
    for (;;) {
      this._stop = new AbortController();
      const { signal } = this._stop;
      try {
        await visible();
        await this._follow(signal);
        wait = FIRST_WAIT;
      } catch (error) {
        if (error.name === "AbortError") continue;
        if (error.status === 401) {
          this._become("locked");
          await once("keychange");
          continue;
        }
      }
      this._become("away");
      await new Promise((resolve) => setTimeout(resolve, wait));
      wait = Math.min(2 * wait, LONGEST_WAIT);
    }
  }

  async _follow(signal) {
    const response = await request(`v1/flexmoe/events?interval=${this._interval}&changes=true`, { signal });
    for await (const { data } of events(response)) {
      const { experts, ...changed } = data;
      this.experts = experts ?? this.experts;
      const figures = { ...this.history.at(-1), ...changed }; // what did not change may be left out
      this.history.push(figures);
      if (this.history.length > 900) this.history.splice(0, 300);
      this._become("ok");
      for (const listener of this._listeners) listener({ ...figures, experts });
      if (document.hidden) this._stop.abort();
    }
  }

  _become(state) {
    if (state === this.state) return;
    this.state = state;
    for (const listener of this._listeners) listener(null);
  }
}

/** Until the page can be seen: a hidden one costs the server nothing. */
function visible() {
  return document.hidden ? once("visibilitychange") : Promise.resolve();
}

function once(event) {
  return new Promise((resolve) => document.addEventListener(event, resolve, { once: true }));
}

export const live = new Live();
