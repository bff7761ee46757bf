"""Qwen2-MoE and Qwen3-MoE: experts in the layers that decoder_sparse_step and mlp_only_layers leave to them.

Qwen2-MoE has a shared expert behind a sigmoid gate and, with use_sliding_window, windows in every second layer below
max_window_layers. Qwen3-MoE has q/k norms over each head, no shared expert, and its window is in every layer.
"""

from __future__ import annotations

from dataclasses import replace

from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.models.families._common import Family, decoder, read_attention, read_moe, same_layers
from flexmoe.models.families._names import ATTENTION, DENSE, EXPERTS, SHARED_EXPERT
from flexmoe.models.families._reader import Reader
from flexmoe.models.families._windows import read_switched_window, read_windows


def _read_qwen2(reader: Reader) -> ModelConfig:
    bias = reader.flag("qkv_bias")
    shared = reader.count("shared_expert_intermediate_size")
    moe = read_moe(reader, expert_width="moe_intermediate_size", renormalize=reader.flag("norm_topk_prob"),
                   shared_width=shared)  # fmt: skip
    last = reader.get(int, "max_window_layers") or 0
    windows = read_windows(reader, lambda i: i % 2 == 0 and i < last)
    layers = _layers(reader, tuple(LayerConfig(True, window) for window in windows))
    attention = read_attention(reader, qkv_bias=bias)
    return decoder(reader, attention, layers, moe=moe, dense_width=reader.count("intermediate_size"))


def _read_qwen3(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias")
    moe = read_moe(reader, expert_width="moe_intermediate_size", renormalize=reader.flag("norm_topk_prob"))
    reader.skip("max_window_layers")  # transformers gives the window to all layers of this family
    layers = _layers(reader, same_layers(reader, is_moe=True, window=read_switched_window(reader)))
    attention = read_attention(reader, qkv_bias=bias, out_bias=bias, qk_norm="head")
    return decoder(reader, attention, layers, moe=moe, dense_width=reader.count("intermediate_size"))


def _layers(reader: Reader, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """Layer i has experts if i + 1 is a multiple of decoder_sparse_step and i is not in mlp_only_layers."""
    step, dense = reader.count("decoder_sparse_step"), reader.integers("mlp_only_layers")
    return tuple(replace(layer, is_moe=(i + 1) % step == 0 and i not in dense) for i, layer in enumerate(layers))


_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
}

FAMILIES = (
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        read=_read_qwen2,
        names={**ATTENTION, **DENSE, **EXPERTS, **SHARED_EXPERT},
        defaults={
            **_DEFAULTS,
            "intermediate_size": 5632,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "max_window_layers": 28,
            "qkv_bias": True,
        },
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        read=_read_qwen3,
        names={**ATTENTION, **DENSE, **EXPERTS},
        defaults={
            **_DEFAULTS,
            "intermediate_size": 6144,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
)
