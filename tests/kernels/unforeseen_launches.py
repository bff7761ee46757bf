"""Which launches of an engine's steps did those who compile ahead not foresee? Leaves: a JSON list of the steps.

    python -m tests.kernels.unforeseen_launches

Steps are laid out as an engine does it, from requests, and for models of more layers than those look at. Nothing is
compiled. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.engine.compile_worker import Job, WithoutProducts, compile_all
from flexmoe.engine.cuda_graph import bucket_of
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.prompt_graphs import form_of
from flexmoe.engine.prompt_rows import lay_out, pack
from flexmoe.kernels.triton.compile_only import compile_only
from flexmoe.kernels.triton.tiles import tiles_of
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import PDL_CAPABILITY, Sampling
from flexmoe.models.families import read_config
from flexmoe.models.fused import FusedDecoder
from flexmoe.models.fused_prompts import PromptDecoder
from flexmoe.models.hopper import imagined_kernels
from flexmoe.models.presets import PRESETS
from flexmoe.moe.load import ExpertCounter
from flexmoe.scheduling.step import ScheduledChunk
from tests.cpu.paging import decodes, scattered
from tests.cpu.tiny_decoders import config

CPU, BLOCK_SIZE, MOST_TOKENS = torch.device("cpu"), 16, 4096
GPU = "NVIDIA H200"
_PRESETS = ("olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b")
_LAYERS = 7  # more than are looked at ahead
ROWS = (1, 2, 3, 5, 8, 9, 16, 23, 33, 64)
PROMPTS: tuple[tuple[int, ...], ...] = (
    (1,), (5, 17), (100,), (300, 2), (700,), (16,) * 20, (2000,), (2049,), (2050,), (2056,), (2064,),
    (2500, 12), (3333,), (3334,), (3336,), (4096,),
)  # fmt: skip
# Layers in turn, so that each is beside each.
MIXED = config(layers=tuple(LayerConfig(is_moe=i % 3 > 0, window=8 if i % 2 else None) for i in range(12)))


class Engine:
    """What an engine on a GPU launches, step by step."""

    def __init__(self, model: ModelConfig, router: float) -> None:
        decoder = Decoder(model, ParallelPlan(), "reference", MOST_TOKENS, dtype=torch.bfloat16, device=CPU).eval()
        for layer in decoder.decoder_layers:
            if layer.moe is not None:
                layer.moe.router.weight.data.fill_(router)
        decoder.pack(in_place=True)
        table = tiles_of(GPU)
        hopper = imagined_kernels(attends=True, multiplies=True)
        self._fused = FusedDecoder(decoder, MOST_TOKENS, CPU, table, max(ROWS), pdl=True, hopper=hopper)
        self._prompts = PromptDecoder(decoder, MOST_TOKENS, CPU, table, pdl=True, hopper=hopper)
        self._cache = KVCache(model, 1, BLOCK_SIZE, torch.bfloat16, CPU)
        self._counter = ExpertCounter(model, CPU)

    def decode(self, rows: int) -> None:
        requests, blocks = scattered([40] * rows, BLOCK_SIZE, MIXED.vocab_size)
        packed = PackedRows(bucket_of(rows), blocks, CPU)
        packed.load(decodes(requests), [-1] * rows, [])
        for sampling in (None, Sampling(packed.sampling, filtered=False), Sampling(packed.sampling, filtered=True)):
            for long in (False, True):
                self._fused.step(packed.rows, sampling, self._cache, long=long)
        self._fused.count(bucket_of(rows), self._counter)

    def prompts(self, counts: tuple[int, ...]) -> None:
        requests, _ = scattered(counts, BLOCK_SIZE, MIXED.vocab_size)
        chunks = [ScheduledChunk(request, 0, request.num_tokens, True) for request in requests]
        rows, form = self._prompts.block_rows, form_of(chunks, self._prompts.block_rows)
        if form is None:
            laid_out = lay_out(chunks, BLOCK_SIZE, rows, CPU)
        else:
            laid_out = form.rows_of(torch.from_numpy(pack(chunks, form, rows)), rows, BLOCK_SIZE)
        logits = self._prompts.logits(laid_out, self._cache)
        if form is not None:
            self._prompts.choose(logits, torch.zeros(len(logits), dtype=torch.int64))


def job(hf_config: dict[str, Any], *, exact_router: bool) -> Job:
    return Job(
        hf_config=hf_config, dtype="bfloat16", gpu=GPU, capability=PDL_CAPABILITY, shared=227 * 1024,
        block_size=BLOCK_SIZE, max_position=MOST_TOKENS, rows=max(ROWS), tokens=MOST_TOKENS,
        exact_router=exact_router, attends=True, multiplies=True,
    )  # fmt: skip


def unforeseen(preset: str, seen: list[str], router: float) -> Iterator[str]:
    """router: all of its weights."""
    hf_config = dict(PRESETS[preset].hf_config) | {"num_hidden_layers": _LAYERS}
    compile_all(job(hf_config, exact_router=router == 0.0))
    foreseen, engine = len(seen), Engine(read_config(hf_config), router)
    assert foreseen > 0, "no launch was seen"
    for take, sizes in ((engine.decode, ROWS), (engine.prompts, PROMPTS)):
        for size in sizes:
            take(size)  # type: ignore[operator]
            yield from (f"{preset}, routers of {router}, a step of {size}: {name}" for name in seen[foreseen:])
            foreseen = len(seen)


def main() -> None:
    seen: list[str] = []
    compile_only(PDL_CAPABILITY, lambda name: bool(seen.append(name)))  # type: ignore[func-returns-value]
    with torch.inference_mode(), WithoutProducts():
        found = [line for preset in _PRESETS for line in unforeseen(preset, seen, 0.0)]
        found += unforeseen(_PRESETS[0], seen, 1 / 3)  # as of a checkpoint in fp32
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
