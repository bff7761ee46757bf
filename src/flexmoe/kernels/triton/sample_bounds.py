"""How far below the likeliest token of its row a token may lie to survive top_k and top_p. No sort: see `sample`.

Enters: logits fp32 [T, V], what `sample` found of their range, the filters [T]. Leaves: bounds fp32 [T].

A token's distance is (largest logit - logit) / temperature, >= 0; its weight is exp(-distance). top_k asks for the
least distance within which there are k tokens, top_p for the least within which there is a share p of the weight that
top_k leaves. Launches, one after the other:

  coarse   (row, slice)  a histogram of the distances: it says in which bin top_k's bound lies, and, as the distances in
                         a bin say what its tokens may weigh, in which few bins top_p's does
  fine     (row, slice)  the exact weight below those bins, and histograms of what is in them; skipped if levels == 1
  collect  (row, slice)  the exact count and weight below the bins of those histograms, and a list of what is in them
  settle   (row)         bisects that list

Sums are whole numbers, hence the same in any order: no result depends on tiles, on the batch, or on who adds first.
Kernels that need the same distances, bins or edges compute them anew: so with operations that the compiler cannot fuse.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from flexmoe.kernels.sample import COLDEST
from flexmoe.kernels.triton.argmax import LOWEST, candidate_logit, number

# Weights are counted in units of 2^-44 of the likeliest token's: one of 2^-21 or more is an exact multiple.
_UNITS = tl.constexpr(2.0**44)
REACH = tl.constexpr(30.5)  # exp(-30.5) is less than one unit
_COLDEST = tl.constexpr(COLDEST)
_NEAREST = tl.constexpr(1e-30)
_ALL = tl.constexpr(2**31 - 1)
# By how much a weight, or the sum of some, may be off by rounding: more than it ever is.
_ABOVE = tl.constexpr(1.0 + 2.0**-13)
_BELOW = tl.constexpr(1.0 - 2.0**-12)
_SLACK = tl.constexpr(2.0**20)  # units; weights of that many tokens may have lost less than one each

# A row's tally: histograms [coarse, fine of top_k, fine of top_p] of BINS words, then these words.
_BEFORE = tl.constexpr(0)  # by `fine`: weight below top_k's coarse bin, below top_p's, and count below top_k's
_MASS = tl.constexpr(4)  # by `collect`: weight below the span of top_k's bound and inside, the same of top_p's
_COUNT = tl.constexpr(8)  # the same counts, but that of what lies below the span of top_p's
_ENDS = tl.constexpr(12)  # bits ^ _ALL of the least distance inside, bits of the largest: for top_k, for top_p
_LISTED = tl.constexpr(16)
_SUMS = 32  # so many that rows stay aligned


def tally_words(bins: int) -> int:
    """How many int64, zero at first, these kernels need for a row."""
    return 3 * bins + _SUMS


@triton.jit
def weigh(logits, peak, temperature):
    """Distances; weights; weights in whole units, int64. The operations are always the same, and so the bits."""
    distance = tl.div_rn(peak - logits, temperature)
    weight = tl.exp(-distance)
    return distance, weight, (weight * _UNITS).to(tl.int64)


@triton.jit
def divisor(temperature, peak):
    """What to divide by, and whether there is something to draw: the row is not greedy, and its logits are numbers."""
    return tl.maximum(temperature, _COLDEST), (temperature > 0.0) & (tl.abs(peak) < float("inf"))


@triton.jit
def filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V):
    """Temperature, k (_ALL: no bound), p, whether k sets a bound, whether p does."""
    k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row).to(tl.float64)
    by_k = (k > 0) & (k < V)
    return tl.load(temperature_ptr + row), tl.where(by_k, k, _ALL), p, by_k, p < 1.0


@triton.jit
def _four(a, b, c, d):
    """Four vectors [N] as one [N, 2, 2]: reduced or scanned together, they wait for other warps once."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _split_four(joined):
    """The four of [..., 2, 2]."""
    ac, bd = tl.split(joined)
    a, c = tl.split(ac)
    b, d = tl.split(bd)
    return a, b, c, d


@triton.jit
def _row(peaks_ptr, depths_ptr, temperature, row, C, BLOCK_C: tl.constexpr):
    """Largest logit, what to divide by, the largest distance that matters, and whether there is something to draw.

    The lowest finite logit's distance matters, unless weights are 0 before; it is never 0 itself.
    """
    chunks = tl.arange(0, BLOCK_C)
    peaks = tl.load(peaks_ptr + row * C + chunks, mask=chunks < C, other=LOWEST)
    depths = tl.load(depths_ptr + row * C + chunks, mask=chunks < C, other=LOWEST)
    peak, depth = tl.split(tl.max(tl.join(peaks, depths), 0))
    peak, floor = candidate_logit(peak), number(depth.to(tl.int32) ^ -1)
    temperature, drawn = divisor(temperature, peak)
    return peak, temperature, tl.maximum(tl.minimum(tl.div_rn(peak - floor, temperature), REACH), _NEAREST), drawn


@triton.jit
def _bin(distance, start, scale, BINS: tl.constexpr):
    """Which bin of a histogram; those before its start are in the first one, those past its end in the last one."""
    return tl.maximum(tl.minimum((distance - start) * scale, BINS - 1.0), 0.0).to(tl.int32)


@triton.jit
def _most(histogram, start, scale, BINS: tl.constexpr):
    """The most that the tokens in each bin may weigh, in units; and the share of it that they weigh at least."""
    width = tl.div_rn(1.0, scale)
    near = tl.fma(tl.arange(0, BINS).to(tl.float32), width, start)
    most = (tl.exp(-near) * (_ABOVE * _UNITS)).to(tl.int64)
    return histogram * most, (tl.exp(-width) * _BELOW).to(tl.float64)


@triton.jit
def _bin_of_k(histogram, count, most, k, BINS: tl.constexpr):
    """From running sums: the bin of top_k's bound, past the last if there are no k tokens; the most weight below it,
    and up to its end.
    """
    few = count < k
    past = tl.where(few, tl.arange(0, BINS) + 1, 0).to(tl.int64)
    upto = tl.where(count - histogram < k, most, 0)
    bin_k, below, upto, _ = _split_four(tl.max(_four(past, tl.where(few, most, 0), upto, upto), 0))
    return bin_k.to(tl.int32), below, upto


@triton.jit
def _bins_of_p(p, before, most, share, least_total, most_total, BINS: tl.constexpr):
    """First and last bin where top_p's bound may lie. before: the weight below all bins, exactly; most, share: of them.

    The bound's bin is the first whose running sum reaches p * total; only limits of either are known.
    """
    early = (p * least_total - before.to(tl.float64)).to(tl.int64)
    late = ((p * most_total.to(tl.float64) - before.to(tl.float64) + _SLACK) / share).to(tl.int64) + 1
    both = tl.sum((most < early).to(tl.int32) + ((most < late).to(tl.int32) << 16))
    return both & 0xFFFF, tl.minimum(both >> 16, BINS - 1)


@triton.jit
def _coarse_bins(histogram, scale, k, p, by_p, BINS: tl.constexpr):
    """Bin of top_k's bound (BINS: all tokens stay), first and last bin of top_p's (first BINS: it asks for none)."""
    most, share = _most(histogram, 0.0, scale, BINS)
    count, most = tl.split(tl.cumsum(tl.join(histogram, most), 0))
    bin_k, below, upto = _bin_of_k(histogram, count, most, k, BINS)
    first_p, last_p = _bins_of_p(p, below * 0, most, share, below.to(tl.float64) * share - _SLACK, upto, BINS)
    return bin_k, tl.where(by_p, first_p, BINS), tl.minimum(last_p, bin_k)


@triton.jit
def _fine_scale(scale, first, last, BINS: tl.constexpr):
    """Start and scale of the fine histogram of coarse bins first..last."""
    span = tl.maximum(last - first + 1, 1)
    return tl.div_rn(first.to(tl.float32), scale), tl.div_rn(scale * BINS, span.to(tl.float32))


@triton.jit
def _coarse_doubt(distance, reach, scale, bin_k, first_p, last_p, BINS: tl.constexpr):
    """Of each distance: surely within top_k's bound? perhaps? and the same of top_p's."""
    within = distance <= reach
    place = _bin(distance, 0.0, scale, BINS)
    inside_p = within & (place >= first_p) & (place <= last_p)
    return within & (place < bin_k), within & (place == bin_k), within & (place < first_p), inside_p


@triton.jit
def _fine_doubt(distance, doubt, fine_k, fine_p, before, scale, bin_k, first_p, last_p, k, p, BINS: tl.constexpr):
    """The same, from the fine histograms fine_k, fine_p [BINS] and what lies `before` them. doubt: of _coarse_doubt."""
    below_k, inside_k, below_p, inside_p = doubt
    mass_k, mass_p, count_k = before
    start_k, scale_k = _fine_scale(scale, bin_k, bin_k, BINS)
    start_p, scale_p = _fine_scale(scale, first_p, last_p, BINS)
    place_k, place_p = _bin(distance, start_k, scale_k, BINS), _bin(distance, start_p, scale_p, BINS)
    most_k, share_k = _most(fine_k, start_k, scale_k, BINS)
    most_p, share_p = _most(fine_p, start_p, scale_p, BINS)
    count, most_k, most_p, _ = _split_four(tl.cumsum(_four(fine_k, most_k, most_p, most_p), 0))
    bin_k, below, upto = _bin_of_k(fine_k, count_k + count, most_k, k, BINS)
    least_total = mass_k.to(tl.float64) + (below.to(tl.float64) * share_k - _SLACK)
    first_p, last_p = _bins_of_p(p, mass_p, most_p, share_p, least_total, mass_k + upto, BINS)
    return (
        below_k | (inside_k & (place_k < bin_k)),
        inside_k & (place_k == bin_k),
        below_p | (inside_p & (place_p < first_p)),
        inside_p & (place_p >= first_p) & (place_p <= last_p),
    )


@triton.jit
def _add_four(sums_ptr, a, b, c, d):
    """Add the sums of four vectors to four words. Whole numbers: whoever adds first, the result is the same."""
    sums = tl.reshape(tl.sum(_four(a, b, c, d), 0), [4]).to(tl.int64)
    tl.atomic_add(sums_ptr + tl.arange(0, 4), sums, mask=sums > 0, sem="relaxed")


@triton.jit
def coarse(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, peaks_ptr, depths_ptr, tally_ptr, C, WORDS,
    SLICE: tl.constexpr, BINS: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    temperature, _k, _p, by_k, by_p = filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V)
    logits = tl.load(logits_ptr + row * stride + tokens, mask=tokens < V, other=float("-inf"))
    if PDL:
        tl.extra.cuda.gdc_wait()
    peak, temperature, reach, drawn = _row(peaks_ptr, depths_ptr, temperature, row, C, BLOCK_C)
    if drawn & (by_k | by_p):
        distance, _weight, _units = weigh(logits, peak, temperature)
        place = _bin(distance, 0.0, tl.div_rn(BINS * 1.0, reach), BINS)
        count = tl.histogram(place, BINS, mask=distance <= reach)
        tl.atomic_add(tally_ptr + row * WORDS + tl.arange(0, BINS), count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def fine(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, peaks_ptr, depths_ptr, tally_ptr, C, WORDS,
    SLICE: tl.constexpr, BINS: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    temperature, k, p, by_k, by_p = filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V)
    logits = tl.load(logits_ptr + row * stride + tokens, mask=tokens < V, other=float("-inf"))
    if PDL:
        tl.extra.cuda.gdc_wait()
    tally_ptr += row * WORDS
    histogram = tl.load(tally_ptr + tl.arange(0, BINS))
    peak, temperature, reach, drawn = _row(peaks_ptr, depths_ptr, temperature, row, C, BLOCK_C)
    if drawn & (by_k | by_p):
        scale = tl.div_rn(BINS * 1.0, reach)
        bin_k, first_p, last_p = _coarse_bins(histogram, scale, k, p, by_p, BINS)
        distance, _weight, units = weigh(logits, peak, temperature)
        below_k, inside_k, below_p, inside_p = _coarse_doubt(distance, reach, scale, bin_k, first_p, last_p, BINS)
        mass_k, mass_p, count_k = tl.where(below_k, units, 0), tl.where(below_p, units, 0), below_k.to(tl.int64)
        _add_four(tally_ptr + 3 * BINS + _BEFORE, mass_k, mass_p, count_k, tl.zeros_like(units))
        # Few tokens are inside: one addition each is less work than a histogram of all.
        one = tl.full([SLICE], 1, tl.int64)
        start, fine_scale = _fine_scale(scale, bin_k, bin_k, BINS)
        at = BINS + _bin(distance, start, fine_scale, BINS)
        tl.atomic_add(tally_ptr + at, one, mask=inside_k, sem="relaxed")
        start, fine_scale = _fine_scale(scale, first_p, last_p, BINS)
        at = 2 * BINS + _bin(distance, start, fine_scale, BINS)
        tl.atomic_add(tally_ptr + at, one, mask=inside_p, sem="relaxed")


@triton.jit
def collect(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, peaks_ptr, depths_ptr, tally_ptr, found_ptr, C,
    WORDS, SLICE: tl.constexpr, BINS: tl.constexpr, LEVELS: tl.constexpr, ROOM: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # size: one pass over the logits; its parts share what they have loaded.
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    temperature, k, p, by_k, by_p = filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V)
    logits = tl.load(logits_ptr + row * stride + tokens, mask=tokens < V, other=float("-inf"))
    if PDL:
        tl.extra.cuda.gdc_wait()
    tally_ptr += row * WORDS
    sums_ptr = tally_ptr + 3 * BINS
    bins = tl.arange(0, BINS)
    histogram = tl.load(tally_ptr + bins)
    if LEVELS == 2:
        fine_k, fine_p = tl.load(tally_ptr + BINS + bins), tl.load(tally_ptr + 2 * BINS + bins)
        before_ptr = sums_ptr + _BEFORE
        before = (tl.load(before_ptr), tl.load(before_ptr + 1), tl.load(before_ptr + 2))
    peak, temperature, reach, drawn = _row(peaks_ptr, depths_ptr, temperature, row, C, BLOCK_C)
    if drawn & (by_k | by_p):
        scale = tl.div_rn(BINS * 1.0, reach)
        bin_k, first_p, last_p = _coarse_bins(histogram, scale, k, p, by_p, BINS)
        distance, _weight, units = weigh(logits, peak, temperature)
        doubt = _coarse_doubt(distance, reach, scale, bin_k, first_p, last_p, BINS)
        if LEVELS == 2:
            doubt = _fine_doubt(distance, doubt, fine_k, fine_p, before, scale, bin_k, first_p, last_p, k, p, BINS)
        below_k, inside_k, below_p, inside_p = doubt
        mass_k, mass_inside_k = tl.where(below_k, units, 0), tl.where(inside_k, units, 0)
        mass_p, mass_inside_p = tl.where(below_p, units, 0), tl.where(inside_p, units, 0)
        _add_four(sums_ptr + _MASS, mass_k, mass_inside_k, mass_p, mass_inside_p)
        below, listed_k, listed_p = below_k.to(tl.int32), inside_k.to(tl.int32), inside_p.to(tl.int32)
        listed = listed_k | listed_p
        _add_four(sums_ptr + _COUNT, below, listed_k, listed_p, tl.zeros_like(listed))
        count = tl.sum(listed)
        if count > 0:
            bits = distance.to(tl.int32, bitcast=True)
            near_k, far_k = tl.where(inside_k, bits ^ _ALL, 0), tl.where(inside_k, bits, 0)
            near_p, far_p = tl.where(inside_p, bits ^ _ALL, 0), tl.where(inside_p, bits, 0)
            ends = tl.reshape(tl.max(_four(near_k, far_k, near_p, far_p), 0), [4]).to(tl.int64)
            tl.atomic_max(sums_ptr + _ENDS + tl.arange(0, 4), ends, mask=ends > 0, sem="relaxed")
            # In the order of arrival, which sums of whole numbers do not depend on.
            first = tl.atomic_add(sums_ptr + _LISTED, count.to(tl.int64), sem="relaxed")
            at = first + tl.cumsum(listed) - 1
            tl.store(found_ptr + row * ROOM + at, logits, mask=(listed > 0) & (at < ROOM))


@triton.jit
def _bisect(
    src_ptr, size, peak, temperature, masses_ptr, ends_ptr, before, inside, k, wanted, BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The bound by count or by weight, and the weight within it. src[:size] holds at least what is inside the span.

    before, inside: tokens below the span, and in it. Distances are >= 0, so their bits, as integers, are in their
    order. Ends with one logit in doubt, or several equal ones. Of an empty span: REACH, and the weight below it.
    """
    mass_before = tl.load(masses_ptr)
    mass_high = mass_before + tl.load(masses_ptr + 1)
    start = (tl.load(ends_ptr) ^ _ALL).to(tl.int32) - 1
    low, high = start, tl.load(ends_ptr + 1).to(tl.int32)
    count_low, count_high = before, before + inside
    while (high - low > 1) & (count_high - count_low > 1):
        middle = low + (high - low) // 2
        count, mass = before, mass_before
        for at in range(0, size, BLOCK):
            places = at + tl.arange(0, BLOCK)
            logits = tl.load(src_ptr + places, mask=places < size, other=float("-inf"))
            distance, _weight, units = weigh(logits, peak, temperature)
            bits = distance.to(tl.int32, bitcast=True)
            within = (bits > start) & (bits <= middle)
            both = tl.sum(tl.join(within.to(tl.int64), tl.where(within, units, 0)), 0)
            more, heavier = tl.split(both)
            count += more
            mass += heavier
        if BY_MASS:
            enough = mass.to(tl.float64) >= wanted
        else:
            enough = count >= k
        high, low = tl.where(enough, middle, high), tl.where(enough, low, middle)
        count_high, count_low = tl.where(enough, count, count_high), tl.where(enough, count_low, count)
        mass_high = tl.where(enough, mass, mass_high)
    return tl.where(inside > 0, high.to(tl.float32, bitcast=True), REACH), mass_high


@triton.jit
def settle(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, peaks_ptr, depths_ptr, tally_ptr, found_ptr,
    bound_ptr, C, WORDS, BINS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    temperature, k, p, by_k, by_p = filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums_ptr = tally_ptr + row * WORDS + 3 * BINS
    src_ptr, size = found_ptr + row * ROOM, tl.load(sums_ptr + _LISTED).to(tl.int32)
    counts_ptr, masses_ptr, ends_ptr = sums_ptr + _COUNT, sums_ptr + _MASS, sums_ptr + _ENDS
    below, inside_k, inside_p = tl.load(counts_ptr), tl.load(counts_ptr + 1), tl.load(counts_ptr + 2)
    peak, temperature, _reach, drawn = _row(peaks_ptr, depths_ptr, temperature, row, C, BLOCK_C)
    if drawn & (by_k | by_p):
        if size > ROOM:
            src_ptr = logits_ptr + row * stride
            size = V
        bound, total = _bisect(
            src_ptr, size, peak, temperature, masses_ptr, ends_ptr, below, inside_k, k, 0.0, False, BLOCK
        )
        if by_p:
            wanted = p * total.to(tl.float64)
            bound, _mass = _bisect(
                src_ptr, size, peak, temperature, masses_ptr + 2, ends_ptr + 2, below * 0, inside_p, k, wanted, True,
                BLOCK,
            )  # fmt: skip
        tl.store(bound_ptr + row, bound)
