"""Choosing tokens: vocabularies, batches and filters by tiles.

Logits lie in the cache here, as in a decode step, where the kernel before has just written them: few sets of buffers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from harness import Case, run
from torch import Tensor

from flexmoe.kernels.sample import SampleParams
from flexmoe.kernels.triton import argmax, sample
from flexmoe.kernels.triton.argmax import ArgmaxTile, greedy
from flexmoe.kernels.triton.sample import SampleTile

_VOCABULARIES = (32_000, 50_304, 151_936)
_BATCHES = (1, 4, 16, 64, 256)
_SETS = 2
# temperature, top_k, top_p, whether the launches for filters are there. "idle": they are, and no row needs them.
_ASKED: dict[str, tuple[float, int, float, bool]] = {
    "temperature": (0.8, 0, 1.0, False),
    "idle": (0.8, 0, 1.0, True),
    "top_k": (0.8, 50, 1.0, True),
    "top_p": (0.8, 0, 0.95, True),
    "top_k top_p": (0.8, 50, 0.95, True),
    "top_p of flat": (50.0, 0, 0.95, True),
}
_TUNED = ("top_k top_p", "top_p of flat")


def _logits(batch: int, vocabulary: int) -> Tensor:
    return torch.randn(batch, vocabulary, device="cuda") * 3


def _greedy_launches(batch: int, vocabulary: int, tile: ArgmaxTile) -> list[Callable[[], None]]:
    scratch = torch.empty(argmax.scratch_words(batch, vocabulary, tile), dtype=torch.int64, device="cuda")
    out = torch.empty(batch, dtype=torch.int64, device="cuda")
    sets = [_logits(batch, vocabulary) for _ in range(_SETS)]
    return [functools.partial(greedy, logits, out, scratch, tile=tile, pdl=True) for logits in sets]


def _sample_launches(batch: int, vocabulary: int, asked: str, tile: SampleTile) -> list[Callable[[], None]]:
    temperature, top_k, top_p, filtered = _ASKED[asked]
    full = functools.partial(torch.full, (batch,), device="cuda")
    params = SampleParams(
        full(fill_value=temperature, dtype=torch.float32),
        full(fill_value=top_k, dtype=torch.int32),
        full(fill_value=top_p, dtype=torch.float64),
        full(fill_value=0.0, dtype=torch.float32),
        torch.rand(batch, dtype=torch.float64, device="cuda"),
    )
    scratch = torch.empty(sample.scratch_words(batch, vocabulary, tile), dtype=torch.int64, device="cuda")
    out = torch.empty(batch, dtype=torch.int64, device="cuda")
    sets = [_logits(batch, vocabulary) for _ in range(_SETS)]
    return [
        functools.partial(sample.sample, logits, params, out, scratch, filtered=filtered, tile=tile, pdl=True)
        for logits in sets
    ]


def _argmax_tiles(batch: int, vocabulary: int) -> Iterator[ArgmaxTile]:
    default = argmax.default_tile(batch, vocabulary)
    yield default
    for factor, warps in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        yield ArgmaxTile(min(8192, default.chunk * factor), warps, default.row_warps)


def _sample_tiles(batch: int, vocabulary: int) -> Iterator[SampleTile]:
    default = sample.default_tile(batch, vocabulary)
    yield default
    for size, warps in itertools.product((128, 256, 512, 1024, 2048), (1, 2, 4, 8)):
        if 32 <= size // warps <= 256 and default.slice // 2 <= size <= default.slice * 4:
            yield replace(default, slice=size, slice_warps=warps)
    for chunk, warps in itertools.product((256, 512, 1024, 2048, 4096), (2, 4, 8)):
        if default.chunk // 2 <= chunk <= default.chunk * 2:
            yield replace(default, chunk=chunk, chunk_warps=warps)
    for rounds, lanes, enough in itertools.product((2, 3, 4), (8, 16, 32), (128, 512)):
        if default.slice * lanes // default.slice_warps <= 4096:  # more would not fit the registers
            yield replace(default, rounds=rounds, lanes=lanes, enough=enough)
    for block, warps in itertools.product((128, 512), (1, 2, 4)):
        yield replace(default, block=block, row_warps=warps)


def cases() -> Iterator[Case]:
    """Greedy, then every kind of filter."""
    for vocabulary, batch in itertools.product(_VOCABULARIES, _BATCHES):
        shape, size = f"V{vocabulary} batch {batch}", batch * vocabulary * 4
        for choice in dict.fromkeys(_argmax_tiles(batch, vocabulary)):
            yield Case(
                f"greedy {shape}",
                {"tile": choice},
                size,
                functools.partial(_greedy_launches, batch, vocabulary, choice),
            )
        for asked in _ASKED:
            tiles = _sample_tiles(batch, vocabulary) if asked in _TUNED else (sample.default_tile(batch, vocabulary),)
            for tile in dict.fromkeys(tiles):
                make = functools.partial(_sample_launches, batch, vocabulary, asked, tile)
                yield Case(f"{asked} {shape}", {"tile": tile}, size, make)


if __name__ == "__main__":
    run("sample", cases())
