"""The K best experts of each row, by softmax probability, ties to the lower id; and the same for one row, inlined.

Enters: logits fp32 [T, E]. Leaves: `topk` writes expert ids and weights [T, K]; the device functions `select_expert`
and `select_experts` give one choice of one row, or all K, to the prologue of other kernels, which saves a launch.

All compare exp(logit - max) as an integer, whose order is the same for numbers >= 0: integers have a warp-wide maximum
in one instruction. The choices are found in rounds, each the largest of what is left. Counting for every expert how
many stand before it would take one step instead, but E^2 comparisons in every program.

A row is held as a tuple of vectors. One warp's width (32) is held by every warp, so in kernels of several warps there
are no barriers and no shared memory, and each warp knows the result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TAKEN_KEY = tl.constexpr(-2)
_PADDING_KEY = tl.constexpr(-1)  # below every number's
_NAN_KEY = tl.constexpr(0x7F800001)  # above every number's, as torch sorts NaN; so a row of NaN still chooses K experts
_TOP_KEY = tl.constexpr(0x7FFFFFFF)
_WARP = tl.constexpr(32)

_MOST_EXPERTS = 1024
_MOST_CHOICES = 16


@triton.jit
def ordered(bits):
    """Bits of fp32 as int32 in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(exponential, valid):
    """An exponential (>= 0 or NaN) -> the integer it is compared by."""
    bits = tl.where(exponential == exponential, exponential.to(tl.int32, bitcast=True), _NAN_KEY)
    return tl.where(valid, bits, _PADDING_KEY)


@triton.jit
def _largest_below(keys, bound):
    best = tl.where(keys[0] < bound, keys[0], _PADDING_KEY)
    for g in tl.static_range(1, len(keys)):
        best = tl.maximum(best, tl.where(keys[g] < bound, keys[g], _PADDING_KEY))
    return tl.max(best, 0)


@triton.jit
def _count_from(keys, bound):
    count = (keys[0] >= bound).to(tl.int32)
    for g in tl.static_range(1, len(keys)):
        count += (keys[g] >= bound).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _lowest_id(keys, value, after, WIDTH: tl.constexpr):
    """The lowest id greater than `after` whose key is `value`; a number >= E if there is none."""
    lane = tl.arange(0, WIDTH)
    none = WIDTH * len(keys)
    lowest = tl.where((keys[0] == value) & (lane > after), lane, none)
    for g in tl.static_range(1, len(keys)):
        ids = g * WIDTH + lane
        lowest = tl.minimum(lowest, tl.where((keys[g] == value) & (ids > after), ids, none))
    return tl.min(lowest, 0)


@triton.jit
def _exponentials(logits_ptr, E, BLOCK_E: tl.constexpr, WIDTH: tl.constexpr):
    """One row -> its keys, BLOCK_E / WIDTH times [WIDTH], and the sum of the exponentials."""
    GROUPS: tl.constexpr = (BLOCK_E + WIDTH - 1) // WIDTH
    lane = tl.arange(0, WIDTH)
    logits = tl.tuple(())
    for g in tl.static_range(GROUPS):
        ids = g * WIDTH + lane
        logits += (tl.load(logits_ptr + ids, mask=ids < E, other=float("-inf")),)
    best = ordered(logits[0].to(tl.int32, bitcast=True))
    for g in tl.static_range(1, GROUPS):
        best = tl.maximum(best, ordered(logits[g].to(tl.int32, bitcast=True)))
    top = ordered(tl.max(best, 0)).to(tl.float32, bitcast=True)
    keys = tl.tuple(())
    total = tl.zeros([WIDTH], tl.float32)
    for g in tl.static_range(GROUPS):
        exponential = tl.exp(logits[g] - top)
        valid = g * WIDTH + lane < E
        keys += (key_of(exponential, valid),)
        total += tl.where(valid, exponential, 0.0)
    return keys, tl.sum(total, 0)


@triton.jit
def select_expert(logits_ptr, E, BLOCK_E: tl.constexpr, K: tl.constexpr, k, RENORMALIZE: tl.constexpr):
    """The k-th choice (0 <= k < K <= E) of the row of fp32 logits at logits_ptr: (expert int32, weight fp32).

    BLOCK_E >= E, a power of two, at most 256 (more costs registers and time to compile). RENORMALIZE: the weights of
    the K choices sum to 1; it takes K rounds instead of k + 1, so leave it off where the weight is not used. Whatever
    the logits (NaN too), the expert is within 0..E-1. For all K choices in one program, `select_experts` is cheaper.
    """
    keys, total = _exponentials(logits_ptr, E, BLOCK_E, _WARP)
    value = _largest_below(keys, _TOP_KEY)
    chosen = value
    before = 0  # how many are larger than `value`
    skip = 0  # how many equal to `chosen`, with lower ids, are earlier choices
    shared = 0.0
    for _ in range(K if RENORMALIZE else k + 1):
        upto = _count_from(keys, value)
        here = (before <= k) & (k < upto)
        chosen = tl.where(here, value, chosen)
        skip = tl.where(here, k - before, skip)
        taken = tl.maximum(tl.minimum(upto, K) - before, 0)
        shared += tl.maximum(value, 0).to(tl.float32, bitcast=True) * taken.to(tl.float32)
        before = upto
        value = _largest_below(keys, value)
    expert = _lowest_id(keys, chosen, -1, _WARP)
    for _ in range(skip):
        expert = _lowest_id(keys, chosen, expert, _WARP)
    weight = chosen.to(tl.float32, bitcast=True) / (shared if RENORMALIZE else total)
    return tl.minimum(expert, E - 1), weight


@triton.jit
def _choices(logits_ptr, E, BLOCK_E: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    keys, total = _exponentials(logits_ptr, E, BLOCK_E, WIDTH)
    experts = tl.tuple(())
    exponentials = tl.tuple(())
    shared = 0.0
    for _ in tl.static_range(K):
        value = _largest_below(keys, _TOP_KEY)
        expert = _lowest_id(keys, value, -1, WIDTH)
        left = tl.tuple(())
        for g in tl.static_range(len(keys)):
            left += (tl.where(g * WIDTH + lane == expert, _TAKEN_KEY, keys[g]),)
        keys = left
        experts += (tl.minimum(expert, E - 1),)
        exponentials += (value.to(tl.float32, bitcast=True),)
        shared += value.to(tl.float32, bitcast=True)
    weights = tl.tuple(())
    for k in tl.static_range(K):
        weights += (exponentials[k] / (shared if RENORMALIZE else total),)
    return experts, weights


@triton.jit
def select_experts(logits_ptr, E, BLOCK_E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr):
    """All K choices of the row of fp32 logits at logits_ptr, best first: K experts int32 and K weights fp32, as tuples.

    BLOCK_E as for `select_expert`. Index the tuples by constexpr numbers: `for k in tl.static_range(K)`.
    """
    return _choices(logits_ptr, E, BLOCK_E, _WARP, K, RENORMALIZE)


@triton.jit
def store_choices(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    lengths_ptr,
    row,
    E,
    stride,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    slots_ptr=None,
    slots_stride=0,
    slot_ids_ptr=None,
):
    """Write the K choices of one row; where lengths_ptr (or None) says that it is padding, -1 and 0.

    slots_ptr: None, or where the row's experts are; then slot_ids_ptr gets that.
    """
    live = True
    if lengths_ptr is not None:
        live = tl.load(lengths_ptr + row) > 0
    experts, weights = _choices(logits_ptr + row * stride, E, BLOCK_E, WIDTH, K, RENORMALIZE)
    for k in tl.static_range(K):
        tl.store(ids_ptr + row * K + k, tl.where(live, experts[k], -1))
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + row * slots_stride + experts[k])
            tl.store(slot_ids_ptr + row * K + k, tl.where(live, slot, -1))
        tl.store(weights_ptr + row * K + k, tl.where(live, weights[k], 0.0))


@triton.jit
def _topk(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    lengths_ptr,
    slots_ptr,
    slot_ids_ptr,
    E,
    stride,
    slots_stride,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # One warp a row, so one vector holds the row whatever its width.
    store_choices(
        logits_ptr, ids_ptr, weights_ptr, lengths_ptr, row, E, stride, BLOCK_E, BLOCK_E, K, RENORMALIZE,
        slots_ptr, slots_stride, slot_ids_ptr,
    )  # fmt: skip


def topk(
    logits: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    renormalize: bool,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
    slot_ids: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """logits fp32 [T, E] -> topk_ids int32 [T, K], best first, and topk_weights fp32 [T, K].

    renormalize: weights of a row sum to 1. lengths int32 [T]: a row of length 0 is padding and gets id -1, weight 0.
    slots int32 [T, E], with slot_ids int32 [T, K]: where each row finds each expert, -1 if elsewhere; slot_ids is that
    of the choices.
    ValueError if E > 1024, K > 16 or K > E.
    """
    (T, E), K = logits.shape, topk_ids.shape[1]
    if not K <= E <= _MOST_EXPERTS or not 1 <= K <= _MOST_CHOICES:
        raise ValueError(f"top {K} of {E} experts; up to {_MOST_CHOICES} of {_MOST_EXPERTS} can be chosen.")
    _topk[(T,)](
        logits,
        topk_ids,
        topk_weights,
        lengths,
        slots,
        slot_ids,
        E,
        logits.stride(0),
        0 if slots is None else slots.stride(0),
        BLOCK_E=max(32, triton.next_power_of_2(E)),
        K=K,
        RENORMALIZE=renormalize,
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )
