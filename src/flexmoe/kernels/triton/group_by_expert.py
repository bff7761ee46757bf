"""Which assignments chose each slot, on the device: no sort, no atomics, nothing the host must know.

Enters: slot ids [T, K] (-1: none). Leaves: for each slot the indices t * K + k that chose it, ascending, and how many.

One program a slot. It reads all ids in chunks of rows; a row holds the slot at most once, so a prefix sum over rows, on
top of a running count, says where each hit belongs. Every id is read once per slot, but from the L2 cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupByExpertTile:
    """block_t: how many rows of ids a program reads at once, a power of two. num_stages: chunks in flight."""

    block_t: int
    num_warps: int
    num_stages: int = 1


_MOST_IDS = 8192  # in a chunk: more do not fit in registers, nor several chunks in shared memory


def default_tile(T: int, K: int) -> GroupByExpertTile:
    """One chunk if it can be; one warp, which needs no barriers, for few rows."""
    block_t = min(1024, _MOST_IDS // triton.next_power_of_2(K), max(16, triton.next_power_of_2(T)))
    if T <= 128:
        return GroupByExpertTile(block_t, num_warps=1)
    return GroupByExpertTile(block_t, num_warps=4 if block_t <= 512 else 8, num_stages=1 if block_t >= T else 3)


@triton.jit
def _group_by_expert(
    ids_ptr,
    rows_ptr,
    counts_ptr,
    T,
    capacity,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    slot = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    count = 0
    for start in tl.range(0, T, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_T)
        ids = tl.load(ids_ptr + t[:, None] * K + k, mask=(t[:, None] < T) & (k < K), other=-1)
        choice = tl.max(tl.where(ids == slot, k, -1), 1)  # [BLOCK_T]
        hit = choice >= 0
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(rows_ptr + slot.to(tl.int64) * capacity + place, t * K + choice, mask=hit & (place < capacity))
        count += tl.sum(hit.to(tl.int32), 0)
    tl.store(counts_ptr + slot, tl.minimum(count, capacity))


def group_by_expert(
    topk_ids: Tensor,
    num_slots: int,
    rows: Tensor,
    counts: Tensor,
    *,
    tile: GroupByExpertTile | None = None,
    pdl: bool = False,
) -> None:
    """topk_ids int32 or int64 [T, K] -> rows int32 [num_slots, capacity] and counts int32 [num_slots]; all contiguous.

    rows[s, :counts[s]] are the assignments t * K + k that chose slot s, ascending; what stands behind them is not
    written. A token's choices must differ (-1 apart), so a capacity of T is enough; what exceeds it is dropped.
    """
    T, K = topk_ids.shape
    tile = tile or default_tile(T, K)
    _group_by_expert[(num_slots,)](
        topk_ids,
        rows,
        counts,
        T,
        rows.shape[1],
        K=K,
        BLOCK_T=tile.block_t,
        BLOCK_K=triton.next_power_of_2(K),
        STAGES=tile.num_stages,
        PDL=pdl,
        num_warps=tile.num_warps,
        launch_pdl=pdl,
    )
