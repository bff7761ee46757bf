"""The second half of an expert: models and batches by tiles; few rows on their own ("gemv"), and grouped by expert.

The rows' experts differ from set to set, so bytes are those expected of uniform routing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

from expert_buffers import FEW, MANY, SHAPES, WIDTHS, Shape, buffers, expected_bytes
from harness import Case, run
from moe_shapes import DTYPE

from flexmoe.bench.tune_candidates import down_gemv_tiles, down_tiles
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
    width = WIDTHS[shape.name]
    yield default_gemv_tile(shape.top_k, width, DTYPE)
    yield from (tile for tile in down_gemv_tiles(width, shape.top_k, DTYPE.itemsize) if not tile.early_ids)


def grouped_tiles(shape: Shape, batch: int) -> Iterator[DownTile]:
    """Around the default's rows of an expert."""
    best = default_tile(batch, shape.top_k, shape.experts, shape.hidden, WIDTHS[shape.name], DTYPE)
    yield best
    yield from down_tiles(best, DTYPE.itemsize)


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
