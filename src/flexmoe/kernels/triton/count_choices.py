"""How often each expert was chosen in a step, added up on the device: one launch for all layers.

Enters: the choices of every MoE layer. Leaves: counters that go on counting, of choices and of steps with any.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CountTile:
    """block_e: experts of a program; block_n: choices it looks at together. Powers of two."""

    block_e: int = 32
    block_n: int = 64
    num_warps: int = 4


@triton.jit
def _count_choices(
    ids_ptr, counts_ptr, active_ptr, layer_stride, N, E,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (L, blocks of E)."""
    layer = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    found = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ids = tl.load(ids_ptr + layer * layer_stride + n, mask=n < N, other=-1)
        found += tl.sum((ids[None, :] == e[:, None]).to(tl.int32), 1)
    at = layer * E + e
    counts = tl.load(counts_ptr + at, mask=e < E, other=0)
    active = tl.load(active_ptr + at, mask=e < E, other=0)
    tl.store(counts_ptr + at, counts + found, mask=e < E)
    tl.store(active_ptr + at, active + (found > 0).to(tl.int64), mask=e < E)


def count_choices(topk_ids: Tensor, counts: Tensor, active: Tensor, *, tile: CountTile | None = None) -> None:
    """counts[l, e] += how many of topk_ids[l] are e; active[l, e] += 1 if any is.

    topk_ids: int32 [L, T, K], the choices of a layer one after the other; -1, of a padded row, counts nowhere. counts,
    active: int64 [L, E], contiguous.
    """
    (L, T, K), E = topk_ids.shape, counts.shape[1]
    assert topk_ids.stride()[1:] == (K, 1)
    tile = tile or CountTile()
    _count_choices[(L, triton.cdiv(E, tile.block_e))](
        topk_ids, counts, active, topk_ids.stride(0), T * K, E,
        BLOCK_E=tile.block_e, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
