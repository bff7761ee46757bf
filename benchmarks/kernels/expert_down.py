"""The second half of an expert: models and batches by tiles; few rows on their own ("gemv"), and grouped by expert.

The rows' experts differ from set to set, so bytes are those expected of uniform routing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

from expert_buffers import FEW, MANY, SHAPES, SHARED_MEMORY, WIDTHS, Shape, buffers, expected_bytes
from harness import Case, run
from moe_shapes import DTYPE

from flexmoe.kernels.triton.expert_down import (
    DownGemvTile,
    DownTile,
    default_gemv_tile,
    default_tile,
    expert_down_gemv,
    expert_down_grouped,
)


def gemv_tiles(shape: Shape) -> Iterator[DownGemvTile]:
    """All of F at once where it fits, else chunks in registers or on their way through shared memory."""
    yield default_gemv_tile(shape.top_k, WIDTHS[shape.name], DTYPE)
    width = WIDTHS[shape.name]
    chunks = (256, 512, 1024) if width <= 1024 else (1024, 2048, 4096)
    for outputs, columns, warps, stages in itertools.product((1, 2, 4, 8), chunks, (2, 4, 8), (1, 3)):
        burst = outputs * columns * shape.top_k * DTYPE.itemsize
        fits = burst // warps <= 16384 if stages == 1 else 8192 <= burst * (stages - 1) <= SHARED_MEMORY // 2
        split = max(1, warps // shape.top_k)
        if fits and columns // split >= 256 and (stages == 1 or columns < width):
            yield DownGemvTile(outputs, columns, warps, stages)


def grouped_tiles(shape: Shape, batch: int) -> Iterator[DownTile]:
    """Around the default's rows of an expert."""
    best = default_tile(batch, shape.top_k, shape.experts, shape.hidden, WIDTHS[shape.name], DTYPE)
    yield best
    rows = {best.block_m, best.block_m * 2 if best.block_m < 64 else best.block_m // 2}
    depths = ((64, 4), (64, 5), (64, 6), (128, 3), (128, 4))  # block_k and num_stages
    ways = ((True, False), (True, True), (False, False), (False, True))  # swap and tma
    for m, n, (k, stages), way in itertools.product(sorted(rows), (64, 128, 256), depths, ways):
        needs = (m + n) * k * DTYPE.itemsize * stages
        if 40 * 1024 <= needs <= SHARED_MEMORY - 2048 and m * n <= 128 * 256:
            yield DownTile(m, n, k, 8 if m * n >= 64 * 256 else 4, stages, *way)


def gemv(shape: Shape, batch: int, tile: DownGemvTile) -> list[Callable[[], None]]:
    """One closure for each layer."""
    return [
        functools.partial(expert_down_gemv, b.hidden, b.ids, b.weights, b.down, b.out, tile=tile, pdl=True)
        for b in buffers(shape, batch)
    ]


def grouped(shape: Shape, batch: int, tile: DownTile) -> list[Callable[[], None]]:
    """One closure for each layer."""
    return [
        functools.partial(expert_down_grouped, b.hidden, b.rows, b.counts, b.weights, b.down, b.y, tile=tile, pdl=True)
        for b in buffers(shape, batch)
    ]


def cases() -> Iterator[Case]:
    """All models, batches and tiles."""
    for shape, batch in itertools.product(SHAPES, FEW):
        for tile in dict.fromkeys(gemv_tiles(shape)):
            make = functools.partial(gemv, shape, batch, tile)
            yield Case(f"gemv {shape.name} batch {batch}", {"tile": tile}, expected_bytes(shape, batch, 1), make)
    for shape, batch in itertools.product(SHAPES, MANY):
        for wide in dict.fromkeys(grouped_tiles(shape, batch)):
            make = functools.partial(grouped, shape, batch, wide)
            yield Case(f"grouped {shape.name} batch {batch}", {"tile": wide}, expected_bytes(shape, batch, 1), make)


if __name__ == "__main__":
    run("expert_down", cases())
