"""Which expert's rows a program of a grouped kernel computes.

Enters: counts int32 [S], how many rows each slot got. Leaves: a grid that does not depend on the counts, and for each
of its programs a slot and a block of that slot's rows; programs past the last block have nothing to do.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools
from statistics import NormalDist

import triton
import triton.language as tl

_TAIL, _PAYS = 32, 0.97  # measured on an H200: tails chosen so take 4 to 12% off, of what they are not chosen for none
_LANES = tl.constexpr(32)


def grid_blocks(tokens: int, top_k: int, slots: int, block: int, tail: int = 0) -> tuple[int, bool]:
    """How many blocks of so many rows there can be, whoever chooses whom; and whether each slot has its own (ONE_EACH).

    tail: how many rows more a slot's last block may hold. No slot gets more than `tokens` rows. All together get
    tokens * top_k, and each that gets any wastes less than a block.
    """
    assignments = tokens * top_k
    most = (assignments + min(slots, assignments) * (block - 1)) // block
    each = max(1, -(-(tokens - tail) // block))
    if slots * each <= most:
        return slots * each, tokens <= block + tail
    return most, False


def block_rows(tokens: int, top_k: int, slots: int) -> int:
    """A block that holds nearly all slots' rows under uniform routing, so that weights are read once; at most 128."""
    active = slots * (1 - (1 - min(1.0, top_k / slots)) ** tokens)
    mean = tokens * top_k / max(active, 1.0)
    most: int = triton.next_power_of_2(int(mean + 3 * mean**0.5))
    return min(128, max(16, most))


@functools.cache
def tail_of(tokens: int, top_k: int, slots: int, block: int) -> int:
    """How many rows a slot's last block of so many may hold beyond it, for prompts: 0, or `_TAIL` where that pays.

    It pays where many slots have a few rows more than fill their blocks. A tail costs a third of a block, and a block
    of few rows as much as any. Uniform routing.
    """
    mean = tokens * top_k / slots
    apart = (mean * (1 - top_k / slots)) ** 0.5
    counts = NormalDist(mean, max(apart, 0.1))
    plain, tailed = 0.0, 0.0
    for full in range(int(mean + 4 * apart) // block + 1):  # of a slot that has more rows than so many blocks hold
        more = 1 - counts.cdf(full * block + 0.5)
        plain += more
        if full == 0:
            tailed += more
        else:
            beyond = 1 - counts.cdf(full * block + _TAIL + 0.5)
            tailed += beyond + (more - beyond) / 3
    return _TAIL if tailed < _PAYS * plain else 0


@triton.jit
def in_groups(GROUP: tl.constexpr):
    """(block of rows, block of columns) of this program in the order of a grid (blocks, columns); 0: as they come.

    GROUP blocks of rows meet all columns before the next ones do: then the programs at work at one time share both
    rows and weights in the L2 cache, where rows of all blocks would not fit.
    """
    block, column = tl.program_id(0), tl.program_id(1)
    if GROUP > 0:
        blocks, columns = tl.num_programs(0), tl.num_programs(1)
        index = column * blocks + block
        before = index // (GROUP * columns) * GROUP
        high = tl.minimum(blocks - before, GROUP)
        index = index % (GROUP * columns)
        block, column = before + index % high, index // high
    return block, column


@triton.jit
def find_block(counts_ptr, index, S: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, ONE_EACH: tl.constexpr):
    """The index-th block, slot after slot: (slot, first row, rows of the slot); no rows: there is no such block.

    A slot has as many blocks as leave no more than TAIL rows behind them, one at least if it has any rows: see
    `has_tail`. ONE_EACH: no slot can have more than one block, so block and slot are one. Otherwise blocks are counted
    up 32 slots at a time: a vector of one warp's width is held by every warp, so there are no barriers.
    """
    if ONE_EACH:
        return index, index * 0, tl.load(counts_ptr + index)
    slot = index * 0
    before = index * 0  # blocks of the slots before `slot`
    passed = index * 0  # blocks of all slots before this group
    for g in tl.static_range((S + _LANES - 1) // _LANES):
        ids = g * _LANES + tl.arange(0, _LANES)
        counts = tl.load(counts_ptr + ids, mask=ids < S, other=0)
        blocks = (counts + BLOCK_M - 1) // BLOCK_M
        if TAIL > 0:
            blocks = tl.where(counts > TAIL, (counts - TAIL + BLOCK_M - 1) // BLOCK_M, (counts > 0).to(tl.int32))
        ends = passed + tl.cumsum(blocks, 0)
        skipped = ends <= index
        slot += tl.sum(skipped.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(skipped, ends, 0), 0))
        passed = tl.max(ends, 0)
    count = tl.load(counts_ptr + tl.minimum(slot, S - 1))
    return slot, (index - before) * BLOCK_M, tl.where(slot < S, count, 0)


@triton.jit
def own_block(
    rows_ptr, counts_ptr, capacity,
    S: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, ONE_EACH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """This program's: (slot, where its rows are listed, first row, rows of the slot, block of columns)."""
    block, column = in_groups(GROUP)
    slot, first, count = find_block(counts_ptr, block, S, BLOCK_M, TAIL, ONE_EACH)
    return slot, rows_ptr + slot.to(tl.int64) * capacity, first, count, column


@triton.jit
def has_tail(first, count, BLOCK_M: tl.constexpr, TAIL: tl.constexpr):
    """Whether the block that begins at `first` is its slot's last and has more than BLOCK_M rows: up to TAIL more."""
    left = count - first - BLOCK_M
    return (left > 0) & (left <= TAIL)


@triton.jit
def dot_rows(x, weights, total, SWAP: tl.constexpr):
    """total + x [M, K] @ weights [N, K].T, [M, N]; SWAP: all of it transposed, [N, M]."""
    if SWAP:
        total = tl.dot(weights, x.T, total, input_precision="ieee")
    else:
        total = tl.dot(x, weights.T, total, input_precision="ieee")
    return total
