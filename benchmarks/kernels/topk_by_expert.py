"""Choosing experts and listing their assignments: one launch against two. All in the cache, where a step leaves it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from harness import Case, run
from moe_shapes import BATCHES, SHAPES, Shape

from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.kernels.triton.topk import topk
from flexmoe.kernels.triton.topk_by_expert import TopkByExpertTile, default_tile, topk_by_expert

_TILES = tuple(TopkByExpertTile(t, warps) for t, warps in itertools.product((4, 16, 32, 64, 128), (1, 4, 8)))


def launches(shape: Shape, batch: int, way: str, tile: TopkByExpertTile | None) -> list[Callable[[], None]]:
    """One closure: `topk` alone, `two` launches or `one`."""
    logits = torch.randn(batch, shape.experts, device="cuda")
    ids = torch.empty(batch, shape.top_k, dtype=torch.int32, device="cuda")
    weights = torch.empty(batch, shape.top_k, device="cuda")
    rows = torch.empty(shape.experts, batch, dtype=torch.int32, device="cuda")
    counts = torch.empty(shape.experts, dtype=torch.int32, device="cuda")

    def launch() -> None:
        if way == "one":
            topk_by_expert(
                logits, ids, weights, rows, counts, renormalize=shape.renormalize, tile=tile, pdl=True
            )  # fmt: skip
            return
        topk(logits, ids, weights, renormalize=shape.renormalize, pdl=True)
        if way == "two":
            group_by_expert(ids, shape.experts, rows, counts, pdl=True)

    return [launch]


def cases() -> Iterator[Case]:
    """All models and batches by ways; tiles for the one launch."""
    for shape, batch in itertools.product(SHAPES, BATCHES):
        moved = batch * (shape.experts * 4 + shape.top_k * 12)
        default = default_tile(batch, shape.experts)
        for way in ("topk", "two"):
            make = functools.partial(launches, shape, batch, way, None)
            yield Case(f"{shape.name} batch {batch}", {"way": way}, moved, make)
        for tile in dict.fromkeys((default, *(tile for tile in _TILES if batch <= 256 and tile.block_t <= batch))):
            if tile.block_t * shape.experts // tile.num_warps <= 4096:
                make = functools.partial(launches, shape, batch, "one", tile)
                yield Case(f"{shape.name} batch {batch}", {"way": "one", "tile": tile}, moved, make)


if __name__ == "__main__":
    run("topk_by_expert", cases())
