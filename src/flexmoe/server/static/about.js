/** What the server runs with: asked once, and again after it went away and came back. */

import { getJson } from "./api.js";
import { live } from "./live.js";

let known = null;

/** See /v1/flexmoe/about. */
export function about() {
  known ??= getJson("v1/flexmoe/about").catch((error) => {
    known = null;
    throw error;
  });
  return known;
}

live.listen((figures) => {
  if (figures === null && live.state === "away") known = null;
});
