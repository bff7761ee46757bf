"""The first half of an expert: models and batches by tiles; few rows on their own ("gemv"), and grouped by expert.

The rows' experts differ from set to set, so bytes are those expected of uniform routing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

from expert_buffers import FEW, MANY, SHAPES, SHARED_MEMORY, WIDTHS, Shape, buffers, expected_bytes
from harness import Case, run
from moe_shapes import DTYPE

from flexmoe.kernels.triton.expert_gate_up import (
    GateUpGemvTile,
    GateUpTile,
    default_gemv_tile,
    default_tile,
    expert_gate_up_gemv,
    expert_gate_up_grouped,
)


def gemv_tiles(shape: Shape) -> Iterator[GateUpGemvTile]:
    """Whole rows in registers or on their way through shared memory, and rows in chunks."""
    yield default_gemv_tile(shape.hidden, DTYPE)
    longest = min(4096, shape.hidden)
    for part, warps, pairs in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2)):
        columns = longest // part
        burst = warps * pairs * 2 * columns * DTYPE.itemsize
        for steps, stages in ((1, 1), (2, 1), (4, 3), (8, 3)) if part == 1 else ((1, 1), (1, 3)):
            fits = burst // warps <= 16384 if stages == 1 else 8192 <= burst * (stages - 1) <= SHARED_MEMORY // 2
            if fits and columns >= 512:
                yield GateUpGemvTile(pairs, columns, steps, warps, stages)


def grouped_tiles(shape: Shape, batch: int) -> Iterator[GateUpTile]:
    """Around the default's rows of an expert."""
    best = default_tile(batch, shape.top_k, shape.experts, shape.hidden, WIDTHS[shape.name], DTYPE)
    yield best
    rows = {best.block_m, best.block_m * 2 if best.block_m < 64 else best.block_m // 2}
    depths = ((64, 4), (64, 5), (64, 6), (128, 3), (128, 4))  # block_k and num_stages
    ways = ((True, False), (True, True), (False, False), (False, True))  # swap and tma
    for m, n, (k, stages), way in itertools.product(sorted(rows), (32, 64, 128), depths, ways):
        needs = (m + 2 * n) * k * DTYPE.itemsize * stages
        if 48 * 1024 <= needs <= SHARED_MEMORY - 2048 and not (way[0] and n < 64):
            yield GateUpTile(m, n, k, 8 if m * n >= 64 * 128 else 4, stages, *way)


def gemv(shape: Shape, batch: int, tile: GateUpGemvTile) -> list[Callable[[], None]]:
    """One closure for each layer; it chooses the experts, too."""
    return [
        functools.partial(
            expert_gate_up_gemv, b.x, b.logits, b.ids, b.weights, b.gate_up, b.hidden,
            renormalize=shape.renormalize, tile=tile, pdl=True,
        )
        for b in buffers(shape, batch)
    ]  # fmt: skip


def grouped(shape: Shape, batch: int, tile: GateUpTile) -> list[Callable[[], None]]:
    """One closure for each layer."""
    return [
        functools.partial(
            expert_gate_up_grouped, b.x, b.rows, b.counts, b.gate_up, b.hidden, top_k=shape.top_k, tile=tile, pdl=True
        )
        for b in buffers(shape, batch)
    ]


def cases() -> Iterator[Case]:
    """All models, batches and tiles."""
    for shape, batch in itertools.product(SHAPES, FEW):
        for tile in dict.fromkeys(gemv_tiles(shape)):
            make = functools.partial(gemv, shape, batch, tile)
            yield Case(f"gemv {shape.name} batch {batch}", {"tile": tile}, expected_bytes(shape, batch, 2), make)
    for shape, batch in itertools.product(SHAPES, MANY):
        for wide in dict.fromkeys(grouped_tiles(shape, batch)):
            make = functools.partial(grouped, shape, batch, wide)
            yield Case(f"grouped {shape.name} batch {batch}", {"tile": wide}, expected_bytes(shape, batch, 2), make)


if __name__ == "__main__":
    run("expert_gate_up", cases())
