"""RMS norm of the residual stream: widths and batches by warps. All in the cache, where a step leaves it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from harness import Case, run

from flexmoe.kernels.triton.rms_norm import RMSNormTile, default_tile, rms_norm

_DTYPE = torch.bfloat16


def launches(hidden: int, batch: int, tile: RMSNormTile) -> list[Callable[[], None]]:
    """One closure."""
    x = torch.randn(batch, hidden, device="cuda")
    weight, out = torch.randn(hidden, device="cuda").to(_DTYPE), torch.empty(batch, hidden, dtype=_DTYPE, device="cuda")
    return [functools.partial(rms_norm, x, weight, 1e-5, out, tile=tile, pdl=True)]


def cases() -> Iterator[Case]:
    """Widths of the models, batches, and warps."""
    for hidden, batch in itertools.product((1024, 2048, 4096), (1, 8, 32, 128, 256)):
        for tile in dict.fromkeys((default_tile(hidden), *map(RMSNormTile, (2, 4, 8, 16)))):
            make = functools.partial(launches, hidden, batch, tile)
            yield Case(f"{hidden} batch {batch}", {"tile": tile}, batch * hidden * 6, make)


if __name__ == "__main__":
    run("rms_norm", cases())
