/** Arithmetic of expert loads. */

const MEMORY = 0.7; // of the mean that forgets, at each look

/** Left-to-right order of the experts, and where ranks begin in it. ranks: null for one. */
export function plan({ num_experts: size, placements }) {
  if (placements === null || placements[0].length < 2) {
    return { order: [...Array(size).keys()], boundaries: [], ranks: null };
  }
  const order = [];
  const boundaries = [];
  for (const slots of placements[0]) {
    if (order.length > 0) boundaries.push(order.length);
    order.push(...slots.filter((expert) => !order.includes(expert))); // a replica is drawn at its first place
  }
  return { order, boundaries, ranks: placements[0].length };
}

/** Shares of the tokens by expert, older looks counting less and less. before: the result of the last call, or null. */
export function recent(before, layers) {
  return layers.map(({ counts, tokens }, row) =>
    counts.map((count, expert) => {
      const share = count / (tokens || 1);
      return before === null ? share : MEMORY * before[row][expert] + (1 - MEMORY) * share;
    }),
  );
}

/** What each rank has to do, as a multiple of the mean: replicas of an expert share its tokens evenly. */
export function loadsOfRanks(loads, slots) {
  const replicas = loads.map((_, expert) => slots.flat().filter((held) => held === expert).length);
  const work = slots.map((rank) => rank.reduce((sum, expert) => sum + loads[expert] / replicas[expert], 0));
  const mean = work.reduce((sum, value) => sum + value, 0) / work.length || 1;
  return work.map((value) => value / mean);
}

/** A recording without what an earlier one of the same server had. Both are lines of JSON, one a layer. */
export function minus(text, earlier) {
  if (!earlier) return text;
  const before = new Map(lines(earlier).map((line) => [line.layer, line]));
  const subtract = (a, b) => a.map((value, place) => value - b[place]);
  const rest = lines(text).map((line) => {
    const old = before.get(line.layer);
    if (!old) return line;
    return {
      ...line,
      passes: line.passes - old.passes,
      tokens: line.tokens - old.tokens,
      counts: subtract(line.counts, old.counts),
      active: subtract(line.active, old.active),
    };
  });
  return rest.map((line) => `${JSON.stringify(line)}\n`).join("");
}

const lines = (text) =>
  text
    .trim()
    .split("\n")
    .filter(Boolean)
    .map((line) => JSON.parse(line));
