"""Embeddings of a step's tokens: models and batches by blocks. Every launch takes tokens that no cache holds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from harness import Case, run

from flexmoe.kernels.triton.embed import EmbedTile, default_tile, embed

_DTYPE = torch.bfloat16
_MODELS = {"Mixtral": (32000, 4096), "Qwen3-30B": (151936, 2048), "OLMoE": (50304, 2048), "TinyMistral": (32005, 1024)}
_SETS = 32


def launches(vocabulary: int, hidden: int, batch: int, tile: EmbedTile) -> list[Callable[[], None]]:
    """One closure a set of tokens; half of them sampled on the device."""
    table = torch.randn(vocabulary, hidden, dtype=_DTYPE, device="cuda")
    ids = torch.randint(vocabulary, (2, _SETS, batch), device="cuda")
    sources = torch.arange(batch, dtype=torch.int32, device="cuda")
    sources[::2] = -1
    out, chosen = torch.empty(batch, hidden, device="cuda"), torch.empty(batch, dtype=torch.int64, device="cuda")
    return [
        functools.partial(embed, host, sources, sampled, table, out, chosen, tile=tile, pdl=True)
        for host, sampled in zip(*ids, strict=True)
    ]


def cases() -> Iterator[Case]:
    """All models, batches and blocks."""
    for (name, (vocabulary, hidden)), batch in itertools.product(_MODELS.items(), (1, 8, 32, 128, 256)):
        blocks = [EmbedTile(block, max(1, block // 256)) for block in (256, 512, 1024, 2048)]
        for tile in dict.fromkeys((default_tile(hidden), *blocks)):
            make = functools.partial(launches, vocabulary, hidden, batch, tile)
            yield Case(f"{name} batch {batch}", {"tile": tile}, batch * hidden * 6, make)


if __name__ == "__main__":
    run("embed", cases())
