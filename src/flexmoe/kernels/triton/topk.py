"""The K best experts of each row, by softmax probability, ties to the lower id; and the same for one row, inlined.

Enters: logits fp32 [T, E]. Leaves: `topk` writes expert ids and weights [T, K]; `select_expert`, a device function for
the prologue of other kernels, gives the k-th choice of one row and so saves them a launch.

Both compare exp(logit - max) as an integer, whose order is the same for numbers >= 0: integers have a warp-wide maximum
in one instruction. The k-th choice is found in rounds, each the largest value below the last one. Counting for every
expert how many stand before it would take one step instead, but E^2 comparisons in every program.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

_LANES = tl.constexpr(32)
_PADDING_KEY = tl.constexpr(-1)  # below every number's
_NAN_KEY = tl.constexpr(0x7F800001)  # above every number's, as torch sorts NaN; so a row of NaN still chooses K experts
_TOP_KEY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(bits):
    """Bits of fp32 as int32 in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(exponential, valid):
    """An exponential (>= 0 or NaN) -> the integer it is compared by."""
    bits = tl.where(exponential == exponential, exponential.to(tl.int32, bitcast=True), _NAN_KEY)
    return tl.where(valid, bits, _PADDING_KEY)


@triton.jit
def _largest_below(keys, bound, GROUPS: tl.constexpr):
    best = tl.where(keys[0] < bound, keys[0], _PADDING_KEY)
    for g in tl.static_range(1, GROUPS):
        best = tl.maximum(best, tl.where(keys[g] < bound, keys[g], _PADDING_KEY))
    return tl.max(best, 0)


@triton.jit
def _count_from(keys, bound, GROUPS: tl.constexpr):
    count = (keys[0] >= bound).to(tl.int32)
    for g in tl.static_range(1, GROUPS):
        count += (keys[g] >= bound).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _lowest_id(keys, value, after, GROUPS: tl.constexpr):
    """The lowest id greater than `after` whose key is `value`; 32 * GROUPS if there is none."""
    lane = tl.arange(0, _LANES)
    lowest = tl.where((keys[0] == value) & (lane > after), lane, _LANES * GROUPS)
    for g in tl.static_range(1, GROUPS):
        ids = g * _LANES + lane
        lowest = tl.minimum(lowest, tl.where((keys[g] == value) & (ids > after), ids, _LANES * GROUPS))
    return tl.min(lowest, 0)


@triton.jit
def _exponentials(logits_ptr, E, GROUPS: tl.constexpr):
    """One row -> keys, GROUPS times [32], and the sum of the exponentials."""
    lane = tl.arange(0, _LANES)
    logits = tl.tuple(())
    for g in tl.static_range(GROUPS):
        ids = g * _LANES + lane
        logits += (tl.load(logits_ptr + ids, mask=ids < E, other=float("-inf")),)
    best = _ordered(logits[0].to(tl.int32, bitcast=True))
    for g in tl.static_range(1, GROUPS):
        best = tl.maximum(best, _ordered(logits[g].to(tl.int32, bitcast=True)))
    top = _ordered(tl.max(best, 0)).to(tl.float32, bitcast=True)
    keys = tl.tuple(())
    total = tl.zeros([_LANES], tl.float32)
    for g in tl.static_range(GROUPS):
        exponential = tl.exp(logits[g] - top)
        valid = g * _LANES + lane < E
        keys += (_key(exponential, valid),)
        total += tl.where(valid, exponential, 0.0)
    return keys, tl.sum(total, 0)


@triton.jit
def select_expert(logits_ptr, E, BLOCK_E: tl.constexpr, K: tl.constexpr, k, RENORMALIZE: tl.constexpr):
    """The k-th choice (0 <= k < K <= E) of the row of fp32 logits at logits_ptr: (expert int32, weight fp32).

    BLOCK_E >= E, a power of two, at most 256 (more works and needs more registers). RENORMALIZE: the weights of the K
    choices sum to 1; it costs K rounds instead of k + 1, so leave it off where the weight is not used. Whatever the
    logits (NaN too), the expert is within 0..E-1.

    32 experts at a time: a vector of one warp's width is held by every warp, so there are no barriers and no shared
    memory, and each warp knows the result.
    """
    GROUPS: tl.constexpr = (BLOCK_E + _LANES - 1) // _LANES
    keys, total = _exponentials(logits_ptr, E, GROUPS)
    value = _largest_below(keys, _TOP_KEY, GROUPS)
    chosen = value
    before = 0  # how many are larger than `value`
    skip = 0  # how many equal to `chosen`, with lower ids, are earlier choices
    shared = 0.0
    for _ in range(K if RENORMALIZE else k + 1):
        upto = _count_from(keys, value, GROUPS)
        here = (before <= k) & (k < upto)
        chosen = tl.where(here, value, chosen)
        skip = tl.where(here, k - before, skip)
        taken = tl.maximum(tl.minimum(upto, K) - before, 0)
        shared += tl.maximum(value, 0).to(tl.float32, bitcast=True) * taken.to(tl.float32)
        before = upto
        value = _largest_below(keys, value, GROUPS)
    expert = _lowest_id(keys, chosen, -1, GROUPS)
    for _ in range(skip):
        expert = _lowest_id(keys, chosen, expert, GROUPS)
    weight = chosen.to(tl.float32, bitcast=True) / (shared if RENORMALIZE else total)
    return tl.minimum(expert, E - 1), weight
