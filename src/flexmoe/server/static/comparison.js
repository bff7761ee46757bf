/** What two answers have in common, and what sets them apart. Enters: answers as answer.js gives them. */

import { bytes, rate, seconds } from "./words.js";

/** Rows of a table: what is measured, ours, theirs, and how many times better ours is. */
export function rows(a, b) {
  const both = (name, key, words, ratio) => [
    name,
    words(a[key]),
    words(b[key]),
    ratio ? times(b[key] / a[key]) : "",
  ];
  return [
    both("Time to first token", "ttft", seconds, true),
    both("Time per token after it", "tpot", seconds, true),
    [
      "Tokens a second",
      rate(a.tokensPerSecond),
      rate(b.tokensPerSecond),
      times(a.tokensPerSecond / b.tokensPerSecond),
    ],
    both("Tokens", "tokens", String, false),
    both("Memory of its process or on the GPU", "memory", (value) => bytes(value ?? NaN), true),
    ["Prompt tokens from the prefix cache", String(a.cachedTokens ?? 0), String(b.cachedTokens ?? 0), ""],
  ];
}

const times = (ratio) => (Number.isFinite(ratio) && ratio > 0 ? `${rate(ratio)}×` : "");

/** The first character that differs; null if the texts are equal. */
export function firstDifference(a, b) {
  if (a === b) return null;
  let place = 0;
  while (a[place] === b[place]) place += 1;
  return place;
}
