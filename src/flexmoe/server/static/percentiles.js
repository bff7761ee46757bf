/** Percentiles of latencies from histograms that only grow. */

/** The value below which `share` of the observations lie, between two states of a histogram; null without any. */
export function percentile(bounds, before, now, share) {
  const counts = now.map((count, place) => count - (before?.[place] ?? 0));
  const wanted = share * counts.reduce((sum, count) => sum + count, 0);
  if (wanted === 0) return null;
  let passed = 0;
  for (let place = 0; place < counts.length; place += 1) {
    if (passed + counts[place] >= wanted) {
      const low = place ? bounds[place - 1] : 0;
      const high = bounds[place] ?? low; // of the last bucket only the lower end is known
      return low + (high - low) * ((wanted - passed) / counts[place]);
    }
    passed += counts[place];
  }
  return null;
}
