"""How a step of prompts begins: where each row stands in its request and in the cache, and its embedding, normed.

Enters: token ids, and spans, which tell whose rows are whose. Leaves: positions, places, the residual stream, and the
rows as the first layer takes them. All at once, since each alone would be a launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.prefill_attention import Spans
from flexmoe.kernels.triton.rms_norm import default_tile

_SPANS = 64  # looked at together


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Of T rows, int32 [T] each. positions: in their requests. slots: in the KV cache, -1 for rows of no span.

    lengths: keys of each row, itself included, 0 for rows of no span; None: all are of a span.
    """

    positions: Tensor
    slots: Tensor
    lengths: Tensor | None


@triton.jit(do_not_specialize=["N"])
def _begin_rows(
    token_ids_ptr, table_ptr, weight_ptr, spans_ptr, blocks_ptr, x_ptr, normed_ptr, positions_ptr, slots_ptr,
    lengths_ptr, table_stride, N,
    BY_TOKEN: tl.constexpr, LENGTHS: tl.constexpr, BLOCK_SIZE: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (T,)."""
    row = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    source = row
    if BY_TOKEN:
        source = tl.load(token_ids_ptr + row)
    x = tl.load(table_ptr + source.to(tl.int64) * table_stride + h, mask=h < H, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0)
    span = -1
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        first = tl.load(spans_ptr + n * 4, mask=n < N, other=0)
        count = tl.load(spans_ptr + n * 4 + 1, mask=n < N, other=0)
        span = tl.maximum(span, tl.max(tl.where((first <= row) & (row < first + count), n, -1)))
    there = span >= 0
    span_ptr = spans_ptr + span * 4
    start = tl.load(span_ptr + 2, mask=there, other=0)
    position = tl.where(there, start + row - tl.load(span_ptr, mask=there, other=0), 0)
    first_block = tl.load(span_ptr + 3, mask=there, other=0)
    block = tl.load(blocks_ptr + first_block + position // BLOCK_SIZE, mask=there, other=0)
    tl.store(positions_ptr + row, position)
    tl.store(slots_ptr + row, tl.where(there, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    if LENGTHS:
        tl.store(lengths_ptr + row, tl.where(there, position + 1, 0))
    at = row.to(tl.int64) * H + h
    tl.store(x_ptr + at, x, mask=h < H)
    x *= tl.rsqrt(tl.sum(x * x, 0) / H + EPS)
    tl.store(normed_ptr + at, (x * weight).to(normed_ptr.dtype.element_ty), mask=h < H)


def begin_rows(
    token_ids: Tensor, table: Tensor, weight: Tensor, eps: float, spans: Spans, x: Tensor, normed: Tensor, *,
    by_token: bool, padded: bool,
) -> RowPlaces:  # fmt: skip
    """x [T, H] fp32 = the embeddings of the rows' tokens; normed [T, H] = x by its root mean square, times weight.

    token_ids: int32 [T]. table: [V, H], or with by_token=False the embeddings themselves, [T, H]; its last stride is 1.
    weight: [H]. x, normed: contiguous. spans: those without rows may lie anywhere. padded: whether there may be rows of
    no span. Returns where the rows are.
    """
    rows, hidden = x.shape
    positions, slots = token_ids.new_empty(rows), token_ids.new_empty(rows)
    lengths = token_ids.new_empty(rows) if padded else None
    _begin_rows[(rows,)](
        token_ids, table, weight, spans.spans, spans.tables, x, normed, positions, slots,
        positions if lengths is None else lengths, table.stride(0), len(spans.spans),
        BY_TOKEN=by_token, LENGTHS=padded, BLOCK_SIZE=spans.block_size, H=hidden, EPS=eps,
        BLOCK_H=triton.next_power_of_2(hidden), BLOCK_N=_SPANS, num_warps=default_tile(hidden).num_warps,
    )  # fmt: skip
    return RowPlaces(positions, slots, lengths)
