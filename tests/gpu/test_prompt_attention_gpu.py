"""The kernel for Hopper's tensor cores, of prompts' attention: against plain torch, and a row's bits in all company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import prefill_attention as reference
from flexmoe.kernels.hopper.attention import PromptAttention
from flexmoe.kernels.prefill_attention import Spans
from tests.gpu.hopper import NEEDS_HOPPER, off

DEVICE, D, BLOCK, ROWS = torch.device("cuda"), 128, 16, PromptAttention.rows
pytestmark = NEEDS_HOPPER
# rows of each prompt, and tokens before them
PROMPTS = [
    [(1, 0)], [(128, 0)], [(129, 0)], [(64, 64)], [(17, 0), (300, 0), (1, 500)], [(700, 130), (255, 1), (128, 129)],
    [(1000, 0)], [(1, 1023), (1, 127), (1, 128)],
]  # fmt: skip


def spans_of(prompts: list[tuple[int, int]], block: int = BLOCK, seed: int = 0) -> tuple[Spans, int]:
    """Blocks of the cache in any order; and the slots that it needs."""
    torch.manual_seed(seed)
    needed = [-(-(rows + before) // block) for rows, before in prompts]
    shuffled = torch.randperm(sum(needed))
    spans, blocks, row, table = [], [], 0, 0
    for index, ((rows, before), count) in enumerate(zip(prompts, needed, strict=True)):
        spans.append([row, rows, before, table])
        blocks += [(before + first, index, first) for first in range(0, rows, ROWS)]
        row, table = row + rows, table + count
    longest_first = [[index, first] for _, index, first in sorted(blocks, reverse=True)]

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return Spans(ints(spans), shuffled.int().to(DEVICE), ints(longest_first), ROWS, block), sum(needed) * block


def inputs(rows: int, slots: int, heads: int, kv: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    cache = torch.randn(slots, 2, kv, D, device=DEVICE).to(dtype)
    return torch.randn(rows, heads * D, device=DEVICE).to(dtype), cache


def fresh_of(cache: Tensor, spans: Spans) -> Tensor:
    """The rows' own keys and values."""
    found = []
    for _, count, before, table in spans.spans.tolist():
        at = torch.arange(before, before + count, device=DEVICE)
        found.append(
            cache[spans.tables[table + at // spans.block_size].long() * spans.block_size + at % spans.block_size]
        )
    return torch.cat(found)


def check(
    prompts: list[tuple[int, int]], heads: int = 8, kv: int = 2, window: int | None = None,
    dtype: torch.dtype = torch.bfloat16, block: int = BLOCK,
) -> None:  # fmt: skip
    spans, slots = spans_of(prompts, block)
    rows = sum(count for count, _ in prompts)
    query, cache = inputs(rows, slots, heads, kv, dtype)
    out = torch.full_like(query, torch.nan)
    PromptAttention(DEVICE, dtype)(query, fresh_of(cache, spans), cache, spans, out, window=window)
    expected = reference.prefill_attention(query.double(), cache.double(), spans, window=window)
    shape = rows * heads, D
    assert off(out.view(shape), expected.view(shape)) < (8e-3 if dtype is torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("prompts", PROMPTS, ids=str)
def test_prompts(prompts: list[tuple[int, int]]) -> None:
    check(prompts)


@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (4, 4), (32, 8), (12, 2)])
def test_heads(heads: int, kv: int) -> None:
    check([(200, 77)], heads, kv)


@pytest.mark.parametrize("window", [1, 63, 128, 300])
def test_windows(window: int) -> None:
    check([(500, 200), (64, 0)], window=window)


@pytest.mark.parametrize("block", [1, 8, 64, 256])
def test_sizes_of_the_caches_blocks(block: int) -> None:
    check([(300, 45), (7, 9)], block=block)


def test_fp16() -> None:
    check([(300, 45)], dtype=torch.float16)


def test_many_programs() -> None:
    check([(2048, 0), (900, 333)], heads=16, kv=4)


def test_a_row_has_the_same_bits_however_its_prompt_is_cut() -> None:
    heads, kv, length = 4, 2, 700
    whole, slots = spans_of([(length, 0)])
    query, cache = inputs(length, slots, heads, kv)
    attention = PromptAttention(DEVICE, torch.bfloat16)
    out, again = torch.empty_like(query), torch.empty_like(query)
    attention(query, fresh_of(cache, whole), cache, whole, out)
    for first, count in ((0, 1), (0, 300), (300, 1), (301, 399), (127, 2)):
        part, _ = spans_of([(count, first)])
        tables = whole.tables  # of the same request
        cut = Spans(part.spans, tables, part.blocks, ROWS, BLOCK)
        attention(query[first : first + count], fresh_of(cache, cut), cache, cut, again[first : first + count])
        assert torch.equal(again[first : first + count], out[first : first + count])


def test_rows_and_blocks_of_padding_are_left_alone() -> None:
    spans, slots = spans_of([(150, 20)])
    query, cache = inputs(400, slots, 4, 2)
    padding = torch.tensor([[1, 0], [1, 128]], dtype=torch.int32, device=DEVICE)
    empty = torch.tensor([[150, 0, 0, 0]], dtype=torch.int32, device=DEVICE)
    padded = Spans(torch.cat((spans.spans, empty)), spans.tables, torch.cat((spans.blocks, padding)), ROWS, BLOCK)
    out = torch.full_like(query, torch.nan)
    fresh = torch.cat((fresh_of(cache, spans), cache.new_full((250, *cache.shape[1:]), torch.nan)))
    PromptAttention(DEVICE, torch.bfloat16)(query, fresh, cache, padded, out)
    assert not out[:150].isnan().any()
    assert out[150:].isnan().all()


def test_what_lies_past_a_prompt_does_not_matter() -> None:
    """Keys behind the last one may be anything, so what is written there in other steps is never read."""
    spans, slots = spans_of([(300, 30)])
    query, cache = inputs(300, slots, 4, 2)
    attention, out, again = PromptAttention(DEVICE, torch.bfloat16), torch.empty_like(query), torch.empty_like(query)
    fresh = torch.cat((fresh_of(cache, spans), cache.new_full((128, *cache.shape[1:]), torch.nan)))
    attention(query, fresh, cache, spans, out)
    past = torch.arange(330, slots, device=DEVICE)
    cache[spans.tables.long()[past // BLOCK] * BLOCK + past % BLOCK] = torch.nan
    attention(query, fresh, cache, spans, again)
    assert torch.equal(again, out)
