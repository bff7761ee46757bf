"""Causal attention of prompts over the paged KV cache, a tile of queries and of keys at a time (Dao et al., 2022).

Enters: queries of spans, whose keys and values the cache holds already. Leaves: one output row a query. Tiles of keys
begin at multiples of their size from position 0, so a row's sums have the same order however its prompt is cut.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.prefill_attention import Spans

_LOG2_E = 1.4426950408889634
_NOTHING = tl.constexpr(-1.0e30)  # the maximum of no scores: finite, so that the difference of two is 0 and not NaN


@dataclass(frozen=True, slots=True)
class PrefillAttentionTile:
    """rows: queries of one head a program takes; keys: that it meets at once. Powers of two, at least 16."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def default_tile(head_dim: int, dtype: torch.dtype) -> PrefillAttentionTile:
    """fp32 has no tensor cores that are exact, so tiles there are small.

    Measured on an H200, heads of 128: at 2,048 tokens 310 to 350 TFLOP/s, 290 with twice the rows and eight warps; at
    8,192 tokens 375 to 430, up to 8% less than with twice the rows.
    """
    if dtype is torch.float32:
        return PrefillAttentionTile(16, 32, 4, 1)
    if head_dim > 128:
        return PrefillAttentionTile(64, 32, 4, 2)
    return PrefillAttentionTile(64, 64, 4, 3)


@triton.jit
def _meet(
    q, top, total, acc, cache_ptr, table_ptr, position, first, last, d,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys first..last - 1 into the running maximum, sum and output. Without MASKED all rows see all of them."""
    for start in tl.range(first, last, KEYS):
        n = start + tl.arange(0, KEYS)
        here = n < last
        block = tl.load(table_ptr + n // BLOCK_SIZE, mask=here, other=0)
        slots = (block * BLOCK_SIZE + n % BLOCK_SIZE).to(tl.int64)
        at = cache_ptr + slots[:, None] * (2 * HKV * D) + d[None, :]
        inside = here[:, None] & (d < D)[None, :]
        k = tl.load(at, mask=inside, other=0.0)
        v = tl.load(at + HKV * D, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        if MASKED:
            seen = here[None, :] & (n[None, :] <= position[:, None])
            if WINDOW is not None:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        faded = tl.exp2(top - new_top)
        total = total * faded + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * faded[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _prefill_attention(
    query_ptr, cache_ptr, spans_ptr, blocks_ptr, tables_ptr, out_ptr,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (Hq, B)."""
    head, block = tl.program_id(0), tl.program_id(1)
    span = spans_ptr + 4 * tl.load(blocks_ptr + 2 * block)
    first_query = tl.load(blocks_ptr + 2 * block + 1)
    first_row, count, before, table = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    m = first_query + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    at = (first_row + m).to(tl.int64)[:, None] * (HQ * D) + head * D + d[None, :]
    mask = (m < count)[:, None] & (d < D)[None, :]
    q = tl.load(query_ptr + at, mask=mask, other=0.0)
    position = before + m
    head_ptr = cache_ptr + head // (HQ // HKV) * D
    table_ptr = tables_ptr + table
    top = tl.full([ROWS], _NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    start = before + first_query  # the first query's position
    stop = before + tl.minimum(count, first_query + ROWS)
    if WINDOW is None:
        whole = (start + 1) // KEYS * KEYS  # keys up to here all rows see
        top, total, acc = _meet(
            q, top, total, acc, head_ptr, table_ptr, position, 0, whole, d,
            HKV, D, BLOCK_SIZE, WINDOW, SCALE, KEYS, False,
        )  # fmt: skip
    else:
        whole = tl.maximum(0, start + 1 - WINDOW) // KEYS * KEYS
    top, total, acc = _meet(
        q, top, total, acc, head_ptr, table_ptr, position, whole, stop, d,
        HKV, D, BLOCK_SIZE, WINDOW, SCALE, KEYS, True,
    )  # fmt: skip
    total = tl.where(m < count, total, 1.0)  # rows of padding may have seen nothing
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def prefill_attention(
    query: Tensor,
    cache: Tensor,
    spans: Spans,
    out: Tensor,
    *,
    window: int | None = None,
    tile: PrefillAttentionTile | None = None,
) -> None:
    """As `flexmoe.kernels.prefill_attention`, to out [T, Hq D]; all contiguous. spans.block_rows: those of the tile.

    Blocks that see many keys had best come first, so that the last ones to begin are short.
    """
    num_kv_heads, head_dim = cache.shape[2:]
    num_heads = query.shape[1] // head_dim
    tile = tile or default_tile(head_dim, query.dtype)
    assert spans.block_rows == tile.rows
    assert spans.block_size & (spans.block_size - 1) == 0
    _prefill_attention[(num_heads, len(spans.blocks))](
        query, cache, spans.spans, spans.blocks, spans.tables, out,
        HQ=num_heads, HKV=num_kv_heads, D=head_dim, BLOCK_SIZE=spans.block_size, WINDOW=window,
        SCALE=head_dim**-0.5 * _LOG2_E, ROWS=tile.rows, KEYS=tile.keys,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
