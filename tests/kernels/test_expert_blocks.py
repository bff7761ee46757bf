"""The blocks of a grouped kernel's grid: every row in one of them, whoever chose whom."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from flexmoe.kernels.triton.expert_blocks import find_block, grid_blocks, in_groups
from tests.kernels.support import DEVICE


@triton.jit
def _found(counts_ptr, out_ptr, S: tl.constexpr, BLOCK_M: tl.constexpr, ONE_EACH: tl.constexpr):
    index = tl.program_id(0)
    slot, first, count = find_block(counts_ptr, index, S, BLOCK_M, ONE_EACH)
    tl.store(out_ptr + index * 3, slot)
    tl.store(out_ptr + index * 3 + 1, first)
    tl.store(out_ptr + index * 3 + 2, count)


@pytest.mark.parametrize(("T", "K", "S"), [(1, 2, 8), (1, 8, 128), (7, 8, 64), (16, 3, 40), (33, 2, 6), (50, 1, 1)])
@pytest.mark.parametrize("crowded", [False, True])
def test_every_row_is_in_one_block(T: int, K: int, S: int, crowded: bool) -> None:
    K, block = min(K, S), 16
    ids = torch.arange(K).repeat(T, 1) if crowded else torch.rand(T, S).argsort(-1)[:, :K]
    counts = torch.bincount(ids.flatten(), minlength=S).to(device=DEVICE, dtype=torch.int32)
    blocks, one_each = grid_blocks(T, K, S, block)
    out = torch.full((blocks, 3), -1, dtype=torch.int32, device=DEVICE)
    _found[(blocks,)](counts, out, S=S, BLOCK_M=block, ONE_EACH=one_each)
    wanted = [(s, first, n) for s, n in enumerate(counts.tolist()) for first in range(0, n, block)]
    assert [(s, first, n) for s, first, n in out.tolist() if first < n] == wanted


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
