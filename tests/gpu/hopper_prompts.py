"""A small model whose shapes the kernels for Hopper serve, and steps of prompts through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.engine.prompt_rows import lay_out
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.fused_prompts import PromptDecoder
from flexmoe.models.hopper import HopperKernels
from flexmoe.models.loader import fill_dummy
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk
from tests.cpu.paging import scattered
from tests.cpu.tiny_decoders import config

DEVICE, BLOCK = torch.device("cuda"), 16
MODEL: ModelConfig = config(
    attention={"head_dim": 128, "num_heads": 4, "num_kv_heads": 2}, moe={"num_experts": 4, "expert_width": 136},
    hidden_size=256, layers=(LayerConfig(is_moe=True), LayerConfig(is_moe=True, window=100)),
)  # fmt: skip


@dataclass
class Steps:
    """One model, and what its requests have in the cache."""

    decoder: Decoder
    cache: KVCache
    requests: list[Request]

    @staticmethod
    def of(lengths: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Steps:
        torch.manual_seed(0)
        decoder = Decoder(MODEL, ParallelPlan(), "triton", 2048, dtype=dtype, device=DEVICE).eval()
        fill_dummy({name: p.data for name, p in decoder.named_parameters()}, 0, dtype)
        decoder.pack(in_place=True)
        requests, blocks = scattered(lengths, BLOCK, MODEL.vocab_size)
        cache = KVCache(MODEL, blocks, BLOCK, dtype, DEVICE)
        for layer in cache.layers:
            layer.fill_(torch.nan)
        return Steps(decoder, cache, requests)

    @torch.inference_mode()
    def logits(self, cuts: Sequence[Sequence[int]], hopper: HopperKernels | None) -> Tensor:
        """Of each request's last token, after steps that bring it to so many tokens each."""
        prompts = PromptDecoder(self.decoder, 2048, DEVICE, hopper=hopper)
        before = [0] * len(self.requests)
        for cut in cuts:
            chunks = [
                ScheduledChunk(request, start, stop - start, True)
                for request, start, stop in zip(self.requests, before, cut, strict=True)
                if stop > start
            ]
            found = prompts.logits(lay_out(chunks, BLOCK, prompts.block_rows, DEVICE), self.cache)
            before = list(cut)
        return found
