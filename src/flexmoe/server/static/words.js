/** Numbers as people read them. */

/** 1.23 s, 45 ms, 0.67 ms. */
export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0 s";
  if (value >= 1) return `${value.toPrecision(3)} s`;
  const ms = value * 1000;
  return `${ms >= 100 ? ms.toFixed(0) : ms.toPrecision(2)} ms`;
}

/** 1 token, 2 tokens. */
export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** 12.3 or 1,234. */
export function rate(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
}

/** 312 MB, 1.50 GB. */
export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  return value >= 1e9 ? `${(value / 1e9).toPrecision(3)} GB` : `${Math.round(value / 1e6)} MB`;
}

/** 45 %. */
export const percent = (share) =>
  Number.isFinite(share) ? `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %` : "–";
