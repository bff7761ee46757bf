"""Attention of prompts over the paged cache, against torch, and however a prompt is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import prefill_attention as reference
from flexmoe.kernels.prefill_attention import Spans
from flexmoe.kernels.triton.prefill_attention import PrefillAttentionTile, default_tile, prefill_attention
from tests.kernels.support import DEVICE, DTYPES, Guarded, assert_near, normal

BLOCK_SIZE = 4
Lengths = Sequence[tuple[int, int]]  # of each span: position of its first row, and how many rows
SPANS: list[Lengths] = [[(0, 1)], [(0, 37)], [(0, 5), (9, 18), (30, 1), (3, 33)]]


def lay_out(lengths: Lengths, rows: int) -> tuple[Spans, int]:
    """Requests on blocks that lie anywhere; and how many blocks there are."""
    needed = [-(-(position + count) // BLOCK_SIZE) for position, count in lengths]
    total = sum(needed) + 3
    tables = torch.randperm(total)[: sum(needed)].int()
    spans, blocks, row, table = [], [], 0, 0
    for index, (position, count) in enumerate(lengths):
        spans.append([row, count, position, table])
        blocks += [[index, first] for first in range(0, count, rows)]
        row, table = row + count, table + needed[index]
    made = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (spans, blocks)]
    return Spans(made[0], tables.to(DEVICE), made[1], rows, BLOCK_SIZE), total


def poison(cache: Tensor, spans: Spans) -> None:
    """NaN in every slot that no request has a key in."""
    used = torch.zeros(len(cache), dtype=torch.bool, device=DEVICE)
    for _, count, position, table in spans.spans.tolist():
        places = torch.arange(position + count, device=DEVICE)
        used[spans.tables[table + places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE] = True
    cache[~used] = torch.nan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 3, 24), (8, 1, 64)])
@pytest.mark.parametrize("lengths", SPANS)
def test_every_span_sees_its_own_keys(
    lengths: Lengths, heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    tile = default_tile(dim, dtype)
    spans, blocks = lay_out(lengths, tile.rows)
    T = sum(count for _, count in lengths)
    query, cache = normal(T, heads * dim, dtype=dtype), normal(blocks * BLOCK_SIZE, 2, kv_heads, dim, dtype=dtype)
    poison(cache, spans)
    out = Guarded(T, heads * dim, dtype=dtype)
    prefill_attention(query, cache, spans, out.tensor, window=window)
    assert_near(out.check(), reference.prefill_attention(query, cache, spans, window=window), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 11])
def test_a_row_has_the_same_output_in_any_span(window: int | None, dtype: torch.dtype) -> None:
    tile = PrefillAttentionTile(16, 16, 4, 1)
    whole, blocks = lay_out([(0, 40)], tile.rows)
    query, cache = normal(40, 4 * 32, dtype=dtype), normal(blocks * BLOCK_SIZE, 2, 2, 32, dtype=dtype)
    expected, found = torch.empty_like(query), torch.empty_like(query)
    prefill_attention(query, cache, whole, expected, window=window, tile=tile)
    for first, last in ((0, 13), (13, 14), (14, 40)):
        part, _ = lay_out([(first, last - first)], tile.rows)
        part = Spans(part.spans, whole.tables, part.blocks, tile.rows, BLOCK_SIZE)
        out = torch.empty_like(query[first:last])
        prefill_attention(query[first:last].contiguous(), cache, part, out, window=window, tile=tile)
        found[first:last] = out
    assert_near(found, expected, dtype)
