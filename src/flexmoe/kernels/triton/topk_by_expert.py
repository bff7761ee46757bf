"""The K best experts of each row and, in the same launch, the list of assignments of each expert.

Enters: logits fp32 [T, E]. Leaves: what `topk` and then `group_by_expert` leave.

An expert's program needs no other program's choices: its expert is among the K best of a row if fewer than K come
before it there, and how many do is also which of the choices it is. That is E comparisons for each row and expert,
cheap for the rows of a decode step; for thousands of rows two launches do less work.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.triton.topk import key_of, ordered, store_choices


@dataclass(frozen=True, slots=True)
class TopkByExpertTile:
    """block_t: rows an expert's program ranks at once, a power of two."""

    block_t: int
    num_warps: int


def default_tile(T: int, E: int) -> TopkByExpertTile:
    """At most 16 logits a thread."""
    block_e = triton.next_power_of_2(E)
    block_t = min(triton.next_power_of_2(T), 4096 // block_e)
    return TopkByExpertTile(block_t=block_t, num_warps=4 if block_t * block_e <= 2048 else 8)


@triton.jit
def _ranks(logits_ptr, expert, t, live, E, stride, BLOCK_E: tl.constexpr):
    """How many experts come before this one in the rows t [BLOCK_T]; garbage where not live."""
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = live[:, None] & (e < E)
    logits = tl.load(logits_ptr + t[:, None] * stride + e, mask=inside, other=float("-inf"))
    best = tl.max(ordered(logits.to(tl.int32, bitcast=True)), 1)
    top = ordered(best).to(tl.float32, bitcast=True)
    keys = key_of(tl.exp(logits - top[:, None]), inside)
    own = tl.max(tl.where(e == expert, keys, -1), 1)[:, None]
    return tl.sum(((keys > own) | ((keys == own) & (e < expert))).to(tl.int32), 1)


@triton.jit
def _topk_by_expert(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    lengths_ptr,
    rows_ptr,
    counts_ptr,
    T,
    E,
    stride,
    capacity,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs 0..E-1 list an expert's assignments, the others write a row's choices."""
    program = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if program >= E:
        row = program - E
        store_choices(logits_ptr, ids_ptr, weights_ptr, lengths_ptr, row, E, stride, BLOCK_E, 32, K, RENORMALIZE)
    else:
        count = 0
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            live = t < T
            if lengths_ptr is not None:
                live &= tl.load(lengths_ptr + t, mask=live, other=0) > 0
            rank = _ranks(logits_ptr, program, t, live, E, stride, BLOCK_E)
            hit = live & (rank < K)
            place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(rows_ptr + program * capacity + place, t * K + rank, mask=hit & (place < capacity))
            count += tl.sum(hit.to(tl.int32), 0)
        tl.store(counts_ptr + program, tl.minimum(count, capacity))


def topk_by_expert(
    logits: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    rows: Tensor,
    counts: Tensor,
    *,
    renormalize: bool,
    lengths: Tensor | None = None,
    tile: TopkByExpertTile | None = None,
    pdl: bool = False,
) -> None:
    """`topk` with E up to 256, then `group_by_expert` with an expert a slot; see there for shapes and meaning."""
    (T, E), K = logits.shape, topk_ids.shape[1]
    if not 1 <= K <= E <= 256:
        raise ValueError(f"top {K} of {E} experts; up to 256 experts can be ranked in one launch.")
    tile = tile or default_tile(T, E)
    _topk_by_expert[(E + T,)](
        logits,
        topk_ids,
        topk_weights,
        lengths,
        rows,
        counts,
        T,
        E,
        logits.stride(0),
        rows.shape[1],
        BLOCK_T=tile.block_t,
        BLOCK_E=triton.next_power_of_2(E),
        K=K,
        RENORMALIZE=renormalize,
        PDL=pdl,
        num_warps=tile.num_warps,
        launch_pdl=pdl,
    )
