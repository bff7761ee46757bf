"""The first rows of a decode step: embeddings of tokens, some of which only the device knows yet.

Enters: token ids from the host, ids sampled by an earlier step, and which row takes which. Leaves: the ids and their
embeddings, the start of the residual stream. Where ranks share the table, a row whose token is elsewhere is zero.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EmbedTile:
    """block: columns of a program, a power of two."""

    block: int = 1024
    num_warps: int = 4


def default_tile(hidden: int) -> EmbedTile:
    """Eight columns (16 bytes of a bf16 table) for each of 128 threads; fewer threads for narrow tables."""
    block = min(1024, triton.next_power_of_2(hidden))
    return EmbedTile(block=block, num_warps=max(1, min(4, block // 256)))


@triton.jit
def _embed(
    token_ids_ptr, sources_ptr, sampled_ptr, table_ptr, out_ptr, chosen_ptr, H, table_stride, out_stride, first, held,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, blocks of H)."""
    if PDL:
        # Ids, sources and sampled tokens may all come from an earlier kernel.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    source = tl.load(sources_ptr + row)
    token = tl.load(token_ids_ptr + row, mask=source < 0, other=0)
    token += tl.load(sampled_ptr + source, mask=source >= 0, other=0)
    token = tl.maximum(token, 0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = h < H
    place = token
    if SHARED:
        place = token - first
        here = here & (place >= 0) & (place < held)
    embedding = tl.load(table_ptr + place * table_stride + h, mask=here, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * out_stride + h, embedding.to(out_ptr.dtype.element_ty), mask=h < H)
    if tl.program_id(1) == 0:
        tl.store(chosen_ptr + row, token)


def embed(
    token_ids: Tensor,
    sources: Tensor,
    sampled: Tensor,
    table: Tensor,
    out: Tensor,
    chosen: Tensor,
    *,
    first: int | None = None,
    tile: EmbedTile | None = None,
    pdl: bool = False,
) -> None:
    """chosen[t] = sampled[sources[t]] if sources[t] >= 0 else token_ids[t]; out[t] = table[chosen[t]].

    token_ids: int64 [T]. sources: int32 [T]. sampled: int64, contiguous. table: [V, H]. out: [T, H], fp32 or the
    table's dtype. chosen: int64 [T]; it may be `token_ids`, but not `sampled`. Every id must lie in [0, V) and every
    source in sampled, padded rows included: give those an id that exists. A sampled -1, no token, counts as 0: the step
    that begins with it is void. first: the token of the table's first row, if other ranks hold the others' rows.
    """
    rows, hidden = out.shape
    tile = tile or default_tile(hidden)
    grid = (rows, triton.cdiv(hidden, tile.block))
    _embed[grid](
        token_ids, sources, sampled, table, out, chosen, hidden, table.stride(0), out.stride(0),
        first or 0, table.shape[0], SHARED=first is not None, BLOCK=tile.block, PDL=pdl,
        num_warps=tile.num_warps, launch_pdl=pdl,
    )  # fmt: skip
