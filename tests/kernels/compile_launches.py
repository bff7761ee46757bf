"""Compile what decode steps and prompts launch for an H100 where there is no GPU. Leaves: a JSON line, by kernel.

    python -m tests.kernels.compile_launches

Triton's interpreter takes code that its compiler does not. Here a driver that names a GPU stands in for one that has
it, and every launch stops once its kernel is compiled. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from flexmoe.config.plan import ParallelPlan
from flexmoe.engine.prompt_inputs import PromptInputs
from flexmoe.engine.prompt_rows import lay_out
from flexmoe.kernels.decode_attention import QKNormWeights
from flexmoe.kernels.sample import SampleParams
from flexmoe.kernels.triton import argmax, embed
from flexmoe.kernels.triton.all_reduce import PeerRows, all_reduce
from flexmoe.kernels.triton.combine import combine
from flexmoe.kernels.triton.compile_only import NamedGPU
from flexmoe.kernels.triton.copy_by_expert import copy_by_expert
from flexmoe.kernels.triton.count_choices import count_choices
from flexmoe.kernels.triton.expert_down import DownTile, expert_down_gemv, expert_down_grouped
from flexmoe.kernels.triton.expert_gate_up import GateUpTile, expert_gate_up_gemv, expert_gate_up_grouped
from flexmoe.kernels.triton.gather_rows import gather_rows
from flexmoe.kernels.triton.norm_linear import NormAfter
from flexmoe.kernels.triton.qk_norm_over_ranks import norm_by_sums, qk_norm_over_ranks, sum_squares
from flexmoe.kernels.triton.route import route
from flexmoe.kernels.triton.topk import topk
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import PDL_CAPABILITY, DeviceRows, Sampling
from flexmoe.models.fused import FusedDecoder
from flexmoe.models.fused_prompts import PromptDecoder
from flexmoe.models.presets import PRESETS
from flexmoe.scheduling.step import ScheduledChunk
from tests.cpu.paging import scattered

CPU, BF16 = torch.device("cpu"), torch.bfloat16
_PROMPTS = (("qwen3-30b-a3b", (700,)), ("olmoe-1b-7b", (5, 17)), ("mixtral-8x7b", (2048,)), ("mixtral-8x7b", (100,)))
_STEPS = (("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 32), ("olmoe-1b-7b", 8), ("mixtral-8x7b", 128))


def compile_only(compiled: Counter[str]) -> None:
    """From now on launches compile, as dependent launches if they can be, and do no more; counts them by kernel."""
    triton.runtime.driver.set_active(NamedGPU(PDL_CAPABILITY))
    launch = JITFunction.run

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if "PDL" in options:
            options |= {"PDL": True, "launch_pdl": True}
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled[self.fn.__name__] += 1
        return kernel

    JITFunction.run = run


def step(preset: str, rows: int) -> None:
    """A step of one layer of a model, with a drawn token and a greedy one."""
    config = PRESETS[preset].config
    config = replace(config, layers=config.layers[:1], vocab_size=1024)
    model = Decoder(config, ParallelPlan(), "reference", 64, dtype=BF16, device=CPU).eval()
    model.pack(in_place=True)
    fused = FusedDecoder(model, 64, CPU, max_rows=rows)
    ints = functools.partial(torch.full, dtype=torch.int32)
    on_device = DeviceRows(
        ints((rows,), 0).long(), ints((rows,), -1), ints((rows,), 20), ints((2 * rows,), 0), ints((1,), 2)
    )
    cache = KVCache(config, 2 * rows, 16, BF16, CPU)
    fused.step(on_device, None, cache)
    fused.step(on_device, Sampling(_params(rows), filtered=True), cache)


def prompt(preset: str, counts: tuple[int, ...]) -> None:
    """Prompts of one layer of a model."""
    config = PRESETS[preset].config
    config = replace(config, layers=config.layers[:1], vocab_size=1024)
    model = Decoder(config, ParallelPlan(), "reference", 64, dtype=BF16, device=CPU).eval()
    model.pack(in_place=True)
    prompts = PromptDecoder(model, 4096, CPU)
    requests, blocks = scattered(counts, 16, 1024)
    chunks = [ScheduledChunk(request, 0, request.num_tokens, True) for request in requests]
    cache = KVCache(config, blocks, 16, BF16, CPU)
    logits = prompts.logits(lay_out(chunks, 16, prompts.block_rows, CPU), cache)
    prompts.choose(logits, torch.zeros(len(logits), dtype=torch.int64))
    PromptInputs(64, 8, CPU).fetch()


def _params(rows: int) -> SampleParams:
    ones = torch.ones(rows)
    return SampleParams(temperature=ones, top_k=ones.int(), top_p=ones, min_p=ones, uniform=ones.double())


def ranks() -> None:
    """What only several ranks launch, and counting."""
    T, K, E, S, H, F, V = 2, 2, 8, 4, 256, 512, 1000
    ids = torch.zeros(T, K, dtype=torch.int32)
    places, lengths, words = ids.clone(), ids[:, 0].contiguous(), torch.zeros(T, dtype=torch.int64)
    x, hidden, weights, logits = (torch.zeros(*shape) for shape in ((T, H), (T * K, F), (T, K), (T, E)))
    x, hidden = x.to(BF16), hidden.to(BF16)
    slots: dict[str, Tensor] = {"slots": torch.zeros(T, E, dtype=torch.int32), "slot_ids": places}
    gate_up, down = torch.zeros(S, 2 * F, H, dtype=BF16), torch.zeros(S, H, F, dtype=BF16)
    expert_gate_up_gemv(x, logits, ids, weights, gate_up, hidden, lengths=lengths, renormalize=True, **slots)
    expert_down_gemv(hidden, places, weights, down, x, logits=logits, lengths=lengths, accumulate=False)
    topk(logits, ids, weights, renormalize=True, lengths=lengths, **slots)
    combine(torch.zeros(T * K, H, dtype=BF16), places, x, accumulate=False)
    scratch = torch.zeros(argmax.scratch_words(T, V), dtype=torch.int64)
    argmax.best(torch.zeros(T, V), words, scratch, first=V)
    argmax.winner(torch.zeros(2, T, dtype=torch.int64), words)
    embed.embed(words, lengths, words, torch.zeros(V, H, dtype=BF16), x, words, first=V)
    count_choices(torch.stack([ids] * 3), torch.zeros(3, E).long(), torch.zeros(3, E).long())
    router = torch.zeros(E, H, dtype=BF16)
    route(x.float(), x[0], 1e-5, router, x, logits, is_normed=True)
    heads = QKNormWeights(x[0], x[0, : H // 4], 1e-5, full=True)
    rows_of_heads = torch.zeros(T, H + H // 2, dtype=BF16)
    norm_by_sums(rows_of_heads, sum_squares(rows_of_heads, heads), heads, 2)
    for size in (2, 4, 8):
        peers = PeerRows(x, words.new_zeros(size), words.new_zeros(size), 1)
        all_reduce(peers, x.float(), accumulate=False)
        all_reduce(peers, x.float(), accumulate=True, norm=NormAfter(x[0], 1e-5, x))
        gather_rows(peers, x.repeat(size, 1))
        qk_norm_over_ranks(replace(peers, part=weights), rows_of_heads, heads)


def tails() -> None:
    """The grouped expert kernels with tiles whose last blocks have tails, and what comes before other kernels."""
    T, K, S, H, F = 2048, 2, 8, 1024, 2048
    x, hidden, y = (torch.zeros(*shape, dtype=BF16) for shape in ((T, H), (T * K, F), (T * K, H)))
    gate_up, down = torch.zeros(S, 2 * F, H, dtype=BF16), torch.zeros(S, H, F, dtype=BF16)
    rows, counts = torch.zeros(S, T, dtype=torch.int32), torch.zeros(S, dtype=torch.int32)
    copy_by_expert(x, rows, counts, y, top_k=K, pdl=True)
    for tma in (False, True):
        tile = GateUpTile(128, 128, 64, 8, 4, False, tma, 16, tail=32)
        expert_gate_up_grouped(x, rows, counts, gate_up, hidden, top_k=K, tile=tile)
        down_tile = DownTile(128, 256, 64, 8, 4, False, tma, 8, tail=32)
        expert_down_grouped(hidden, rows, counts, torch.zeros(T, K), down, y, tile=down_tile)


def main() -> None:
    """Raises what the compiler raises."""
    compiled: Counter[str] = Counter()
    compile_only(compiled)
    for preset, rows in _STEPS:
        step(preset, rows)
    for preset, counts in _PROMPTS:
        prompt(preset, counts)
    ranks()
    tails()
    sys.stdout.write(json.dumps(compiled) + "\n")


if __name__ == "__main__":
    main()
