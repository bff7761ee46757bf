"""Listing each expert's assignments: models and batches by tiles. All in the cache, where a step leaves it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from harness import Case, run
from moe_shapes import BATCHES, SHAPES, Shape, random_choices

from flexmoe.kernels.triton.group_by_expert import GroupByExpertTile, default_tile, group_by_expert


def launches(shape: Shape, batch: int, tile: GroupByExpertTile) -> list[Callable[[], None]]:
    """One closure."""
    ids = random_choices(shape, batch)
    rows = torch.empty(shape.experts, batch, dtype=torch.int32, device="cuda")
    counts = torch.empty(shape.experts, dtype=torch.int32, device="cuda")
    return [functools.partial(group_by_expert, ids, shape.experts, rows, counts, tile=tile, pdl=True)]


def tiles(shape: Shape, batch: int) -> Iterator[GroupByExpertTile]:
    """The default, and others that hold up to 64 ids a thread."""
    yield default_tile(batch, shape.top_k)
    for block_t, warps, stages in itertools.product((16, 32, 64, 128, 256, 512, 1024), (1, 2, 4, 8), (1, 3)):
        chunks = -(-batch // block_t)
        if (
            block_t * shape.top_k <= warps * 2048
            and block_t < 2 * batch
            and chunks <= 16
            and (stages == 1) == (chunks == 1)
        ):
            yield GroupByExpertTile(block_t, warps, stages)


def cases() -> Iterator[Case]:
    """All models, batches (up to a long prefill) and tiles."""
    for shape, batch in itertools.product(SHAPES, (*BATCHES, 16384)):
        for tile in dict.fromkeys(tiles(shape, batch)):
            make = functools.partial(launches, shape, batch, tile)
            yield Case(f"{shape.name} batch {batch}", {"tile": tile}, batch * shape.top_k * 8, make)


if __name__ == "__main__":
    run("group_by_expert", cases())
