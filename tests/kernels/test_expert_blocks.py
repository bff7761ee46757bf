"""The blocks of a grouped kernel's grid: every row in one of them, whoever chose whom."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.triton.expert_blocks import find_block, grid_blocks, has_tail, in_groups, tail_of
from tests.kernels.support import DEVICE


@triton.jit
def _found(counts_ptr, out_ptr, S: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, ONE_EACH: tl.constexpr):
    index = tl.program_id(0)
    slot, first, count = find_block(counts_ptr, index, S, BLOCK_M, TAIL, ONE_EACH)
    tl.store(out_ptr + index * 4, slot)
    tl.store(out_ptr + index * 4 + 1, first)
    tl.store(out_ptr + index * 4 + 2, count)
    tl.store(out_ptr + index * 4 + 3, has_tail(first, count, BLOCK_M, TAIL).to(tl.int32))


def found(counts: Tensor, blocks: int, block: int, tail: int, one_each: bool) -> list[tuple[int, int, int, bool]]:
    """(slot, first row, rows of the slot, whether it has a tail) of the blocks that a grid of so many finds."""
    out = torch.full((blocks, 4), -1, dtype=torch.int32, device=DEVICE)
    _found[(blocks,)](counts, out, S=len(counts), BLOCK_M=block, TAIL=tail, ONE_EACH=one_each)
    return [(s, first, n, bool(tailed)) for s, first, n, tailed in out.tolist() if first < n]


def wanted(counts: Tensor, block: int, tail: int) -> list[tuple[int, int, int, bool]]:
    """The same, by taking a block from each slot's rows until none are left, and the rest where it fits a tail."""
    blocks = []
    for slot, n in enumerate(counts.tolist()):
        first = 0
        while first < n:
            tailed = 0 < n - first - block <= tail
            blocks.append((slot, first, n, tailed))
            first += block + (tail if tailed else 0)
    return blocks


@pytest.mark.parametrize(("T", "K", "S"), [(1, 2, 8), (1, 8, 128), (7, 8, 64), (16, 3, 40), (33, 2, 6), (50, 1, 1)])
@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("tail", [0, 16, 32])
def test_every_row_is_in_one_block(T: int, K: int, S: int, crowded: bool, tail: int) -> None:
    K, block = min(K, S), 16
    ids = torch.arange(K).repeat(T, 1) if crowded else torch.rand(T, S).argsort(-1)[:, :K]
    counts = torch.bincount(ids.flatten(), minlength=S).to(device=DEVICE, dtype=torch.int32)
    blocks, one_each = grid_blocks(T, K, S, block, tail)
    assert found(counts, blocks, block, tail, one_each) == wanted(counts, block, tail)


@pytest.mark.parametrize("tail", [0, 16, 32, 64])
def test_a_tail_spares_a_block(tail: int) -> None:
    block = 32
    sizes = (0, 1, tail, block, block + 1, block + tail, block + tail + 1, 3 * block, 3 * block + tail, 100)
    counts = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    assert found(counts, 64, block, tail, False) == wanted(counts, block, tail)
    lengths = [max(int(n > 0), -(-(n - tail) // block)) for n in sizes]
    assert len(wanted(counts, block, tail)) == sum(lengths)


@triton.jit
def _grouped(out_ptr, GROUP: tl.constexpr):
    block, column = in_groups(GROUP)
    index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)  # as programs start
    tl.store(out_ptr + index * 2, block)
    tl.store(out_ptr + index * 2 + 1, column)


@pytest.mark.parametrize("group", [0, 1, 2, 3, 4, 16])
@pytest.mark.parametrize(("blocks", "columns"), [(1, 1), (7, 3), (8, 1), (1, 5), (6, 4)])
def test_groups_of_blocks_meet_all_columns_one_after_the_other(blocks: int, columns: int, group: int) -> None:
    out = torch.full((blocks * columns, 2), -1, dtype=torch.int32, device=DEVICE)
    _grouped[(blocks, columns)](out, GROUP=group)
    size = group or blocks
    wanted = [
        [block, column]
        for first in range(0, blocks, size)
        for column in range(columns)
        for block in range(first, min(blocks, first + size))
    ]
    assert out.tolist() == wanted


def test_the_grid_is_no_larger_than_it_must_be() -> None:
    assert grid_blocks(1, 2, 8, 16) == (2, False)
    assert grid_blocks(32, 8, 128, 32) == (128, True)
    assert grid_blocks(2048, 2, 8, 128) == (39, False)
    assert grid_blocks(40, 8, 128, 32, 16) == (128, True)
    assert grid_blocks(48, 8, 128, 32, 16) == (128, True)
    assert grid_blocks(49, 8, 128, 32, 16) == (136, False)
    assert grid_blocks(10, 2, 4, 32, 16) == (4, True)


@pytest.mark.parametrize(("tokens", "top_k", "slots", "tail"), [
    (2048, 8, 128, 32),  # 128 rows a slot, more or less: half of them have a few too many
    (2048, 8, 64, 32),
    (512, 2, 8, 32),
    (2304, 2, 8, 0),  # 576: the last block is half full
    (3840, 8, 64, 0),  # 480: the last block has room
    (1024, 8, 128, 0),  # 64
    (1, 2, 8, 0),
])  # fmt: skip
def test_tails_where_many_slots_have_a_few_rows_more_than_fill_blocks(
    tokens: int, top_k: int, slots: int, tail: int
) -> None:
    assert tail_of(tokens, top_k, slots, 128) == tail
