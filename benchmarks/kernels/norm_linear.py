"""Dense projections of a decode step: models and batches by tiles, beside torch. Weights rotate, out of every cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Case, run
from torch import Tensor

from flexmoe.kernels.triton.norm_linear import (
    DirectTile,
    DotTile,
    GemvTile,
    Tile,
    default_tile,
    norm_linear,
    scratch_bytes,
)

_CACHE_BYTES = 192 << 20  # of rotating weights, at least: three times L2
_DTYPE = torch.bfloat16
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Shape:
    """One projection, [n, k]. It norms the residual stream, or adds to it. The head's result is fp32."""

    name: str
    n: int
    k: int
    norm: bool
    head: bool = False


SHAPES = (
    Shape("Mixtral qkv", 6144, 4096, True),
    Shape("Mixtral o", 4096, 4096, False),
    Shape("Mixtral head", 32000, 4096, True, True),
    Shape("Qwen3-30B qkv", 5120, 2048, True),
    Shape("Qwen3-30B o", 2048, 4096, False),
    Shape("Qwen3-30B head", 151936, 2048, True, True),
    Shape("OLMoE qkv", 6144, 2048, True),
    Shape("OLMoE o", 2048, 2048, False),
    Shape("OLMoE head", 50304, 2048, True, True),
    Shape("TinyMistral qkv", 1536, 1024, True),
    Shape("TinyMistral o", 1024, 1024, False),
)


def tiles(shape: Shape, batch: int) -> Iterator[Tile | str]:
    """What competes: the default first, plain torch (without norm and residual) last."""
    yield default_tile(batch, shape.n, shape.k, _DTYPE)
    if batch <= 2:
        yield from _gemv_tiles(shape)
    if batch <= 32:
        yield from _direct_tiles(shape, batch)
    if batch >= 8:
        yield from _dot_tiles(shape, batch)
    yield "torch"


def _gemv_tiles(shape: Shape) -> Iterator[GemvTile]:
    for (warps_n, warps_k), (rows, ahead) in itertools.product(((1, 4), (1, 8), (4, 1)), ((1, 8), (2, 4), (2, 8))):
        yield GemvTile(warps_n=warps_n, warps_k=warps_k, rows=rows, ahead=ahead, x_ahead=2 if shape.norm else 4)


# warps_n, warps_k, rows, ahead, x_ahead
_FORMS = (
    (1, 16, 1, 8, 4), (1, 16, 1, 8, 8), (1, 16, 1, 4, 4), (1, 8, 1, 8, 8), (1, 8, 1, 8, 4), (1, 8, 1, 4, 4),
    (1, 8, 2, 4, 2), (1, 4, 1, 8, 4), (1, 4, 1, 8, 2), (1, 4, 1, 4, 4), (1, 4, 2, 4, 2),
)  # fmt: skip
_HEAD_FORMS = ((2, 2, 1, 8, 4), (4, 1, 1, 8, 4), (4, 2, 1, 8, 2), (2, 4, 1, 8, 2))


def _direct_tiles(shape: Shape, batch: int) -> Iterator[DirectTile]:
    fused = (True, False) if shape.norm and batch <= 8 and not shape.head else (False,)
    prefetches = (0,) if shape.head else (0, 2048)
    forms = _FORMS + _HEAD_FORMS if shape.head else _FORMS
    for (warps_n, warps_k, rows, ahead, x_ahead), fuse, prefetch in itertools.product(forms, fused, prefetches):
        registers = 8 * rows * ahead + (8 if fuse else 4) * x_ahead * -(-batch // 8)
        if registers <= (80 if warps_n * warps_k == 16 else 144) and (not prefetch or ahead * 32 * warps_k < shape.k):
            yield DirectTile(warps_n, warps_k, rows, ahead, x_ahead, prefetch=prefetch, fuse_norm=fuse)


# block_n, block_k, warps, stages
_DOT_FORMS = ((32, 128, 4, 5), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4))


def _dot_tiles(shape: Shape, batch: int) -> Iterator[DotTile]:
    largest = min(128, max(16, 1 << (batch - 1).bit_length()))
    for block_t, (block_n, block_k, warps, stages), splits, prefetch in itertools.product(
        {largest, min(64, largest)}, _DOT_FORMS, (1, 2, 4, 8), (0, 1024)
    ):
        programs = -(-shape.n // block_n) * -(-batch // block_t) * splits
        fits = (block_t + block_n) * block_k * 2 * stages <= 200_000
        if fits and shape.k >= 512 * splits and (programs >= 100 or splits == 4) and (splits == 1 or programs <= 400):
            yield DotTile(block_t, block_n, block_k, splits, warps, stages, prefetch if not shape.head else 0)


@functools.lru_cache(maxsize=1)
def weights(shape: Shape) -> list[Tensor]:
    """Rotating weights, of the size that trained ones have."""
    count = -(-_CACHE_BYTES // (shape.n * shape.k * _DTYPE.itemsize)) + 1
    return [torch.randn(shape.n, shape.k, dtype=_DTYPE, device="cuda") * shape.k**-0.5 for _ in range(count)]


def launches(shape: Shape, batch: int, tile: Tile | str) -> list[Callable[[], None]]:
    """One closure a weight."""
    x = torch.randn(batch, shape.k, dtype=torch.float32 if shape.norm else _DTYPE, device="cuda")
    norm_weight = torch.randn(shape.k, dtype=_DTYPE, device="cuda") if shape.norm else None
    if isinstance(tile, str):
        rows = x.to(_DTYPE)
        return [functools.partial(F.linear, rows, weight) for weight in weights(shape)]
    wide = shape.head or not shape.norm
    out = torch.zeros(batch, shape.n, dtype=torch.float32 if wide else _DTYPE, device="cuda")
    size = scratch_bytes(batch, shape.n, shape.k, _DTYPE, norm=shape.norm, tile=tile)
    scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
    return [
        functools.partial(
            norm_linear, x, weight, out, norm_weight=norm_weight, eps=1e-5, residual=not shape.norm, scratch=scratch,
            tile=tile, pdl=True,
        )
        for weight in weights(shape)
    ]  # fmt: skip


def cases() -> Iterator[Case]:
    """All projections, batches and tiles; --filter picks one, as "Qwen3-30B o batch 1 "."""
    for shape, batch in itertools.product(SHAPES, _BATCHES):
        moved = shape.n * shape.k * _DTYPE.itemsize + batch * (shape.k * 2 + shape.n * 4)
        for tile in dict.fromkeys(tiles(shape, batch)):
            kind = tile if isinstance(tile, str) else type(tile).__name__
            make = functools.partial(launches, shape, batch, tile)
            yield Case(f"{shape.name} batch {batch} ", {"kind": kind, "tile": tile}, moved, make)


if __name__ == "__main__":
    run("norm_linear", cases())
