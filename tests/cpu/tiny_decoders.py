"""Small decoders with random weights, and one decode step of them through torch or through the C kernels.

The KV cache holds NaN in every slot that the step does not read, the new tokens' own slots included.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe.config.model import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RopeConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.engine.batch import build_batch, build_paged_rows
from flexmoe.kernels.cpu import library
from flexmoe.kernels.paged_attention import DecodeGroup, PrefillSpan, paged_attention
from flexmoe.kernels.quantize import QuantizedMatrix
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.scheduling.request import Request
from tests.cpu.paging import decode_step, seen, slot

CPU = torch.device("cpu")
NEEDS_COMPILER = pytest.mark.skipif(library.find_compiler() is None, reason="the C kernels need a C compiler")
Stages = dict[tuple[str, int], Tensor]

_ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig(theta=1e4, rotary_dim=16))
_CONFIG = ModelConfig(
    family="tiny", architecture="Tiny", vocab_size=50, hidden_size=64, dense_width=40, attention=_ATTENTION,
    moe=MoEConfig(num_experts=6, top_k=2, expert_width=24, renormalize=True),
    layers=(LayerConfig(is_moe=True), LayerConfig(is_moe=False)), norm_eps=1e-5, max_position=4096,
    tie_embeddings=False,
)  # fmt: skip


def config(attention: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A small model: one MoE layer and one dense; changed as told."""
    own_attention = replace(_CONFIG.attention, **(attention or {}))
    assert _CONFIG.moe is not None
    return replace(_CONFIG, attention=own_attention, moe=replace(_CONFIG.moe, **(moe or {})), **changes)


def placed(num_experts: int, slots: tuple[int, ...]) -> ParallelPlan:
    """A plan by which the one rank holds experts in these slots."""
    return ParallelPlan(placements={None: ExpertPlacement(num_experts, (slots,))})


def empty(config: ModelConfig, dtype: torch.dtype = torch.float32, plan: ParallelPlan | None = None) -> Decoder:
    return Decoder(config, plan or ParallelPlan(), "cpu", config.max_position, dtype=dtype, device=CPU).eval()


def decoder(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    threads: int | None = 1,
    isa: str = "auto",
    quantization: str | None = None,
) -> Decoder:
    """Random weights; threads: those of the C kernels for `isa`, None for torch alone."""
    made = empty(config, dtype)
    if quantization is not None:
        made.quantize(quantization)
    for name, parameter in made.weights().items():
        values = torch.randn(parameter.shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif not name.startswith("embed_tokens"):
            values *= 0.3 if len(parameter.shape) == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(values)
    made.pack(threads, isa=isa)
    return made


def in_fp32(original: Decoder) -> Decoder:
    """The same weights, widened, for torch alone."""
    made = empty(original.config)
    weights = original.weights()
    for name, parameter in made.named_parameters():
        weight = weights[name]
        parameter.data.copy_(weight.dequantize(torch.float32) if isinstance(weight, QuantizedMatrix) else weight)
    made.pack(None)
    return made


def filled_cache(
    config: ModelConfig, requests: Sequence[Request], num_blocks: int, block_size: int, dtype: torch.dtype
) -> KVCache:
    """Random keys and values, exact in bf16, where the requests' latest tokens look back to; elsewhere NaN."""
    cache = KVCache(config, num_blocks, block_size, dtype, CPU)
    for layer, tensor in zip(config.layers, cache.layers, strict=True):
        tensor.fill_(float("nan"))
        for r in requests:
            last = r.num_tokens - 1
            places = [slot(r, p, block_size) for p in seen(last, layer.window) if p < last]
            tensor[places] = torch.randn(len(places), *tensor.shape[1:]).bfloat16().to(dtype)
    return cache


def copy_cache(cache: KVCache, dtype: torch.dtype) -> KVCache:
    made = copy.copy(cache)
    made.layers = [layer.to(dtype, copy=True) for layer in cache.layers]
    return made


class Recording:
    """A probe that keeps what it sees, in fp64."""

    def __init__(self) -> None:
        self.stages: Stages = {}

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        self.stages[stage, layer] = tensor.double().clone()


@torch.inference_mode()
def by_torch(model: Decoder, requests: Sequence[Request], cache: KVCache, rounding: torch.dtype) -> Stages:
    """Every stage of one decode step, "logits" among them; writes the new keys and values, rounded to `rounding`."""

    def attend(query: Tensor, layer: Tensor, groups: Sequence[DecodeGroup | PrefillSpan]) -> Tensor:
        layer.copy_(layer.to(rounding))
        return paged_attention(query, layer, groups)

    recording = Recording()
    windows = sorted({layer.window for layer in model.config.layers}, key=lambda w: w or 0)
    batch = build_batch(decode_step(requests), cache.block_size, windows, CPU, recording)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexmoe.layers.attention.paged_attention", attend)
        model.logits(model(batch, cache), batch)
    return recording.stages


@torch.inference_mode()
def by_c_with_stages(model: Decoder, requests: Sequence[Request], cache: KVCache) -> Stages:
    assert model.native is not None
    recording = Recording()
    model.native(build_paged_rows(decode_step(requests), cache.block_size), cache, recording)
    return recording.stages


@torch.inference_mode()
def by_c(model: Decoder, requests: Sequence[Request], cache: KVCache, *, best: bool = False) -> Tensor:
    """The logits [T, V] of one decode step in a single call of the C kernels; best: where only the largest matter."""
    assert model.native is not None
    return model.native(build_paged_rows(decode_step(requests), cache.block_size), cache, best=best)
