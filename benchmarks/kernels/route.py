"""Norm and router product: models and batches by tiles. The rows lie in the cache, the router's weights do not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from harness import Case, run
from moe_shapes import BATCHES, DTYPE, SHAPES, Shape

from flexmoe.kernels.triton.route import RouteTile, default_tile, route

_COLD_BYTES = 128 << 20
_MOST_SETS = 2048


@functools.lru_cache(maxsize=1)
def _weights(shape: Shape) -> torch.Tensor:
    sets = min(_MOST_SETS, -(-_COLD_BYTES // (shape.experts * shape.hidden * DTYPE.itemsize)))
    return torch.randn(sets, shape.experts, shape.hidden, dtype=DTYPE, device="cuda")


def launches(shape: Shape, batch: int, tile: RouteTile) -> list[Callable[[], None]]:
    """One closure for each router."""
    x = torch.randn(batch, shape.hidden, device="cuda")
    norm_weight = torch.randn(shape.hidden, dtype=DTYPE, device="cuda")
    normed = torch.empty(batch, shape.hidden, dtype=DTYPE, device="cuda")
    logits = torch.empty(batch, shape.experts, device="cuda")

    def launch(weight: torch.Tensor) -> None:
        route(x, norm_weight, 1e-5, weight, normed, logits, tile=tile, pdl=True)

    return [functools.partial(launch, weight) for weight in _weights(shape)]


def tiles(shape: Shape, batch: int) -> Iterator[RouteTile]:
    """The default, and others of both ways where they are not hopeless."""
    yield default_tile(batch, shape.hidden, shape.experts, DTYPE.itemsize)
    if batch <= 256:
        for block_e, warps in itertools.product((1, 2, 4, 8), (2, 4, 8, 16)):
            held = block_e * shape.hidden // (32 * warps)
            if block_e <= shape.experts and 8 <= held <= 64 and batch * shape.experts // block_e <= 8192:
                yield RouteTile(1, block_e, 0, warps, 1)
    if batch < 16:
        return
    for (block_t, block_e), block_k, warps, stages in itertools.product(
        ((16, 16), (32, 32), (64, 32), (64, 64), (64, 128)), (64, 128, 256), (2, 4), (4,)
    ):
        fits = (block_t + block_e) * block_k * DTYPE.itemsize * stages <= 160 << 10
        fills = (block_t * block_e) // warps in range(64, 2049)
        if (
            fits
            and fills
            and (block_t < 64 or block_k < 256)
            and block_e < 2 * max(16, shape.experts)
            and block_t <= batch
        ):
            yield RouteTile(block_t, block_e, block_k, warps, stages)


def cases() -> Iterator[Case]:
    """All models, batches and tiles."""
    for shape, batch in itertools.product(SHAPES, BATCHES):
        moved = shape.hidden * (shape.experts * DTYPE.itemsize + batch * (4 + DTYPE.itemsize))
        for tile in dict.fromkeys(tiles(shape, batch)):
            make = functools.partial(launches, shape, batch, tile)
            yield Case(f"{shape.name} batch {batch}", {"tile": tile}, moved + batch * shape.experts * 4, make)


if __name__ == "__main__":
    run("route", cases())
