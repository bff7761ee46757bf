"""How far below the likeliest token of its row a token may lie to survive top_k and top_p. No sort: see `sample`.

Enters: logits fp32 [T, V], what `sample` found of their range, the filters [T]. Leaves: bounds fp32 [T].

A token's distance is (largest logit - logit) / temperature, >= 0; its weight is exp(-distance). top_k asks for the
least distance within which there are k tokens, top_p for the least within which there is a share p of the weight that
top_k leaves. What is known of either is a span: a distance too small, one large enough, and the count and the weight
within both. Launches, one after the other:

  narrow   (row, slice)  counts and weighs what lies within some probes, distances inside the spans; so the next launch
                         starts with narrower ones. `rounds` of them, left at once where few tokens are in doubt
  collect  (row, slice)  lists the logits that are still in doubt
  settle   (row)         bisects that list

Sums are whole numbers, hence the same in any order: no result depends on tiles, on the batch, or on who adds first.
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
_ALL = tl.constexpr(2**31 - 1)
_MOST = tl.constexpr(2**63 - 1)
_LIMB = tl.constexpr(18)  # bits; sums of 2048 fit an int32, which a warp adds up in one instruction
_LIMB_MASK = tl.constexpr(2**18 - 1)
_COUNT_SHIFT = tl.constexpr(20)  # sums of 2048 of the highest limb are below
_ONE = tl.constexpr(2**20)
WIDEST_SLICE = 2048

# A row's tally: of each round [probes, counts, weights] of LANES words; then the spans that it started with, _SPANS
# words (the first round's: the largest logit alone), and those that `collect` started with; then these words.
_SPANS = tl.constexpr(16)
_PEAK = tl.constexpr(12)
_ENDS = tl.constexpr(0)  # bits ^ _ALL of the least distance listed, bits of the largest: for top_k, for top_p
_LISTED = tl.constexpr(4)


def tally_words(rounds: int, lanes: int) -> int:
    """How many int64, zero at first, these kernels need for a row."""
    return rounds * 3 * lanes + (rounds + 2) * 16


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
def _range_of(peaks_ptr, depths_ptr, row, C, BLOCK_C: tl.constexpr):
    """Largest and lowest finite logit of a row."""
    chunks = tl.arange(0, BLOCK_C)
    peaks = tl.load(peaks_ptr + row * C + chunks, mask=chunks < C, other=LOWEST)
    depths = tl.load(depths_ptr + row * C + chunks, mask=chunks < C, other=LOWEST)
    peak, depth = tl.split(tl.max(tl.join(peaks, depths), 0))
    return candidate_logit(peak), number(depth.to(tl.int32) ^ -1)


@triton.jit
def _spans_ptr(tally_ptr, index, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    """Where the spans are that round `index` started with; past the last round, collect's; past those, the sums."""
    return tally_ptr + ROUNDS * 3 * LANES + index * _SPANS


@triton.jit
def _load_span(ptr):
    """A span: (too small, large enough, tokens within either, units of weight within either)."""
    low, high = tl.load(ptr).to(tl.int32), tl.load(ptr + 1).to(tl.int32)
    low, high = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    return low, high, tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5)


@triton.jit
def _store_span(ptr, span):
    tl.store(ptr, span[0].to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(ptr + 1, span[1].to(tl.int32, bitcast=True).to(tl.int64))
    for i in tl.static_range(2, 6):
        tl.store(ptr + i, span[i])


@triton.jit
def _shrink(span, probes, count, mass, small, large):
    """The span once it is known which of the probes [LANES] are too small, or large enough."""
    return (
        tl.maximum(span[0], tl.max(tl.where(small, probes, -1.0))),
        tl.minimum(span[1], tl.min(tl.where(large, probes, float("inf")))),
        tl.maximum(span[2], tl.max(tl.where(small, count, 0))),
        tl.minimum(span[3], tl.min(tl.where(large, count, _MOST))),
        tl.maximum(span[4], tl.max(tl.where(small, mass, 0))),
        tl.minimum(span[5], tl.min(tl.where(large, mass, _MOST))),
    )


@triton.jit
def _are_wide(span_k, span_p, by_p, ENOUGH: tl.constexpr):
    """Whether too many tokens are in doubt for settle: by top_k, by top_p."""
    return span_k[3] - span_k[2] > ENOUGH, by_p & (span_p[3] - span_p[2] > ENOUGH)


@triton.jit
def _spans_after(
    tally_ptr, k, p, by_p, ROUND: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr, ENOUGH: tl.constexpr
):  # fmt: skip
    """The spans of top_k and top_p after a round.

    How much weight top_k leaves is itself known as a span; so top_p's holds whatever such a weight could ask for. Where
    top_k asks for nothing, or for more tokens than matter, its span ends as the one distance that holds all.
    """
    lane = tl.arange(0, LANES)
    ptr = tally_ptr + ROUND * 3 * LANES + lane
    probes = tl.load(ptr).to(tl.int32).to(tl.float32, bitcast=True)
    count, mass = tl.load(ptr + LANES), tl.load(ptr + 2 * LANES)
    if ROUND == 0:
        span_k = (-1.0, tl.max(probes), 0, tl.max(count), 0, tl.max(mass))
        span_p = span_k
        known = lane >= 0
    else:
        ptr = _spans_ptr(tally_ptr, ROUND, ROUNDS, LANES)
        span_k, span_p = _load_span(ptr), _load_span(ptr + 6)
        wide_k, wide_p = _are_wide(span_k, span_p, by_p, ENOUGH)
        known = lane < tl.where(wide_k | wide_p, LANES, 0)  # else that round was left at once
    span_k = _shrink(span_k, probes, count, mass, known & (count < k), known & (count >= k))
    share = mass.to(tl.float64)
    small = known & (share < p * span_k[4].to(tl.float64))
    large = known & (share >= p * span_k[5].to(tl.float64))
    return span_k, _shrink(span_p, probes, count, mass, small, large)


@triton.jit
def _probes(span_k, span_p, wide_k, wide_p, k, p, ROUND: tl.constexpr, LANES: tl.constexpr):
    """Distances [LANES] inside the spans that are wide; half of them each, if both are.

    They crowd around where the bound would be if tokens lay evenly in the span; the more, the narrower spans are.
    """
    lane = tl.arange(0, LANES)
    first = tl.where(wide_k, LANES // 2, 0)
    for_p = lane >= tl.where(wide_p, first, LANES)
    lanes = tl.where(wide_k & wide_p, LANES // 2, LANES).to(tl.float32)
    wanted = p * 0.5 * (span_k[4].to(tl.float64) + span_k[5].to(tl.float64))
    guess_k = (k - span_k[2]).to(tl.float32) / tl.maximum(span_k[3] - span_k[2], 1).to(tl.float32)
    guess_p = (wanted - span_p[4].to(tl.float64)).to(tl.float32) / tl.maximum(span_p[5] - span_p[4], 1).to(tl.float32)
    low, high = tl.where(for_p, span_p[0], span_k[0]), tl.where(for_p, span_p[1], span_k[1])
    guess = tl.maximum(tl.minimum(tl.where(for_p, guess_p, guess_k), 1.0), 0.0)
    place = (2 * tl.where(for_p, lane - first, lane) + 1).to(tl.float32) / lanes - 1.0  # -1 .. 1
    apart = place * tl.abs(place)
    if ROUND > 1:
        apart *= tl.abs(place)
    low = tl.maximum(low, 0.0)
    return low + (high - low) * (guess + apart * tl.where(place < 0.0, guess, 1.0 - guess))


@triton.jit
def _sum_within(distance, probes, values):
    """Sums of int32 values [SLICE] over the distances [SLICE] within each probe [LANES]."""
    return tl.sum(tl.where(distance[:, None] <= probes[None, :], values[:, None], 0), 0)


@triton.jit
def narrow(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, peaks_ptr, depths_ptr, tally_ptr, C, WORDS,
    ROUND: tl.constexpr, ROUNDS: tl.constexpr, LANES: tl.constexpr, ENOUGH: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # size: what a program knows at the start, and what it adds.
    tl.static_assert(SLICE <= 2048)
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    lane = tl.arange(0, LANES)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    temperature, k, p, by_k, by_p = filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V)
    logits = tl.load(logits_ptr + row * stride + tokens, mask=tokens < V, other=float("-inf"))
    if PDL:
        tl.extra.cuda.gdc_wait()
    tally_ptr += row * WORDS
    peak_ptr = _spans_ptr(tally_ptr, 0, ROUNDS, LANES) + _PEAK
    if ROUND == 0:
        peak, floor = _range_of(peaks_ptr, depths_ptr, row, C, BLOCK_C)
        if tl.program_id(0) == 0:
            tl.store(peak_ptr, peak.to(tl.int32, bitcast=True).to(tl.int64))
    else:
        peak = tl.load(peak_ptr).to(tl.int32).to(tl.float32, bitcast=True)
    temperature, drawn = divisor(temperature, peak)
    if drawn & (by_k | by_p):
        if ROUND == 0:
            # What is farther weighs nothing.
            reach = tl.minimum(tl.div_rn(peak - floor, temperature), REACH)
            probes = reach * tl.div_rn(lane.to(tl.float32), LANES - 1.0)
            wide_k, wide_p = by_k, by_p
        else:
            span_k, span_p = _spans_after(tally_ptr, k, p, by_p, ROUND - 1, ROUNDS, LANES, ENOUGH)
            wide_k, wide_p = _are_wide(span_k, span_p, by_p, ENOUGH)
            probes = _probes(span_k, span_p, wide_k, wide_p, k, p, ROUND, LANES)
            if tl.program_id(0) == 0:
                ptr = _spans_ptr(tally_ptr, ROUND, ROUNDS, LANES)
                _store_span(ptr, span_k)
                _store_span(ptr + 6, span_p)
        ptr = tally_ptr + ROUND * 3 * LANES + lane
        if tl.program_id(0) == 0:
            tl.store(ptr, probes.to(tl.int32, bitcast=True).to(tl.int64))
        if wide_k | wide_p:
            distance, _weight, units = weigh(logits, peak, temperature)
            high = (units >> (2 * _LIMB)).to(tl.int32) + _ONE
            middle, low = ((units >> _LIMB) & _LIMB_MASK).to(tl.int32), (units & _LIMB_MASK).to(tl.int32)
            high = _sum_within(distance, probes, high).to(tl.uint32, bitcast=True).to(tl.int64)
            middle = _sum_within(distance, probes, middle).to(tl.int64)
            low = _sum_within(distance, probes, low).to(tl.int64)
            mass = ((high & (_ONE - 1)) << (2 * _LIMB)) + (middle << _LIMB) + low
            # Whole numbers: whoever adds first, the sum is the same.
            tl.atomic_add(ptr + LANES, high >> _COUNT_SHIFT, mask=high > 0, sem="relaxed")
            tl.atomic_add(ptr + 2 * LANES, mass, mask=mass > 0, sem="relaxed")


@triton.jit
def collect(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, tally_ptr, found_ptr, WORDS, ROUNDS: tl.constexpr,
    LANES: tl.constexpr, ENOUGH: tl.constexpr, SLICE: tl.constexpr, ROOM: tl.constexpr, PDL: tl.constexpr,
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
    peak = tl.load(_spans_ptr(tally_ptr, 0, ROUNDS, LANES) + _PEAK).to(tl.int32).to(tl.float32, bitcast=True)
    temperature, drawn = divisor(temperature, peak)
    if drawn & (by_k | by_p):
        span_k, span_p = _spans_after(tally_ptr, k, p, by_p, ROUNDS - 1, ROUNDS, LANES, ENOUGH)
        if tl.program_id(0) == 0:
            ptr = _spans_ptr(tally_ptr, ROUNDS, ROUNDS, LANES)
            _store_span(ptr, span_k)
            _store_span(ptr + 6, span_p)
        distance, _weight, _units = weigh(logits, peak, temperature)
        inside_k = (distance > span_k[0]) & (distance <= span_k[1])
        inside_p = (distance > span_p[0]) & (distance <= tl.where(by_p, span_p[1], -1.0))
        listed = (inside_k | inside_p).to(tl.int32)
        count = tl.sum(listed)
        if count > 0:
            sums_ptr = _spans_ptr(tally_ptr, ROUNDS + 1, ROUNDS, LANES)
            bits = distance.to(tl.int32, bitcast=True)
            near_k, far_k = tl.where(inside_k, bits ^ _ALL, 0), tl.where(inside_k, bits, 0)
            near_p, far_p = tl.where(inside_p, bits ^ _ALL, 0), tl.where(inside_p, bits, 0)
            ends = tl.max(tl.join(tl.join(near_k, near_p), tl.join(far_k, far_p)), 0)
            ends = tl.reshape(ends, [4]).to(tl.int64)
            tl.atomic_max(sums_ptr + _ENDS + tl.arange(0, 4), ends, mask=ends > 0, sem="relaxed")
            # In the order of arrival, which sums of whole numbers do not depend on.
            first = tl.atomic_add(sums_ptr + _LISTED, count.to(tl.int64), sem="relaxed")
            at = first + tl.cumsum(listed) - 1
            tl.store(found_ptr + row * ROOM + at, logits, mask=(listed > 0) & (at < ROOM))


@triton.jit
def _bisect(
    src_ptr, size, peak, temperature, span, ends_ptr, k, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The bound by count or by weight, and the weight within it. src[:size] holds at least what is inside the span.

    Distances are >= 0, so their bits, as integers, are in their order. Ends with one logit in doubt, or several equal
    ones.
    """
    start = (tl.load(ends_ptr) ^ _ALL).to(tl.int32) - 1
    low, high = start, tl.load(ends_ptr + 1).to(tl.int32)
    count_low, count_high, mass_high = span[2], span[3], span[5]
    empty = count_high == count_low
    while (high - low > 1) & (count_high - count_low > 1):
        middle = low + (high - low) // 2
        count, mass = span[2], span[4]
        for at in range(0, size, BLOCK):
            places = at + tl.arange(0, BLOCK)
            logits = tl.load(src_ptr + places, mask=places < size, other=float("-inf"))
            distance, _weight, units = weigh(logits, peak, temperature)
            bits = distance.to(tl.int32, bitcast=True)
            within = (bits > start) & (bits <= middle)
            more, heavier = tl.split(tl.sum(tl.join(within.to(tl.int64), tl.where(within, units, 0)), 0))
            count += more
            mass += heavier
        if BY_MASS:
            enough = mass.to(tl.float64) >= wanted
        else:
            enough = count >= k
        high, low = tl.where(enough, middle, high), tl.where(enough, low, middle)
        count_high, count_low = tl.where(enough, count, count_high), tl.where(enough, count_low, count)
        mass_high = tl.where(enough, mass, mass_high)
    return tl.where(empty, span[1], high.to(tl.float32, bitcast=True)), mass_high


@triton.jit
def settle(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, tally_ptr, found_ptr, bound_ptr, WORDS,
    ROUNDS: tl.constexpr, LANES: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    temperature, k, p, by_k, by_p = filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V)
    if PDL:
        tl.extra.cuda.gdc_wait()
    tally_ptr += row * WORDS
    peak = tl.load(_spans_ptr(tally_ptr, 0, ROUNDS, LANES) + _PEAK).to(tl.int32).to(tl.float32, bitcast=True)
    spans_ptr = _spans_ptr(tally_ptr, ROUNDS, ROUNDS, LANES)
    sums_ptr = _spans_ptr(tally_ptr, ROUNDS + 1, ROUNDS, LANES)
    span_k, span_p = _load_span(spans_ptr), _load_span(spans_ptr + 6)
    src_ptr, size = found_ptr + row * ROOM, tl.load(sums_ptr + _LISTED).to(tl.int32)
    temperature, drawn = divisor(temperature, peak)
    if drawn & (by_k | by_p):
        if size > ROOM:
            src_ptr = logits_ptr + row * stride
            size = V
        ends_ptr = sums_ptr + _ENDS
        bound, total = _bisect(src_ptr, size, peak, temperature, span_k, ends_ptr, k, 0.0, False, BLOCK)
        if by_p:
            wanted = p * total.to(tl.float64)
            bound, _mass = _bisect(src_ptr, size, peak, temperature, span_p, ends_ptr + 2, k, wanted, True, BLOCK)
        tl.store(bound_ptr + row, bound)
