"""Adding the experts' results: models and batches by tiles. All in the cache, where a step leaves it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from harness import Case, run
from moe_shapes import BATCHES, DTYPE, SHAPES, Shape, random_choices

from flexmoe.kernels.triton.combine import CombineTile, combine, default_tile

_TILES = tuple(
    CombineTile(block_h, warps)
    for block_h, warps in itertools.product((128, 256, 512, 1024), (1, 2, 4, 8))
    if block_h // warps in range(128, 257)
)


def launches(shape: Shape, batch: int, dtype: torch.dtype, tile: CombineTile) -> list[Callable[[], None]]:
    """One closure."""
    y = torch.randn(batch * shape.top_k, shape.hidden, device="cuda").to(dtype)
    ids, out = random_choices(shape, batch), torch.zeros(batch, shape.hidden, device="cuda")
    return [functools.partial(combine, y, ids, out, accumulate=True, tile=tile, pdl=True)]


def cases() -> Iterator[Case]:
    """All models, batches, dtypes of the parts, and tiles."""
    for shape, batch, dtype in itertools.product(SHAPES, BATCHES, (DTYPE, torch.float32)):
        moved = batch * shape.hidden * (shape.top_k * dtype.itemsize + 8)
        for tile in dict.fromkeys((default_tile(batch, shape.hidden), *_TILES)):
            make = functools.partial(launches, shape, batch, dtype, tile)
            yield Case(f"{shape.name} batch {batch} {dtype}", {"tile": tile}, moved, make)


if __name__ == "__main__":
    run("combine", cases())
