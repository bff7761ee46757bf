"""Mixtral: every layer is MoE with renormalised top-k weights; one sliding window, or none, for all layers.

Refused by name: biases, q/k norms, clip_qkv, shared experts, norm_topk_prob=false (Mixtral always renormalises).
"""

from __future__ import annotations

from flexmoe.config.model import ModelConfig
from flexmoe.models.families._common import Family, decoder, read_attention, read_moe, read_window, same_layers
from flexmoe.models.families._names import ATTENTION, MIXTRAL_EXPERTS
from flexmoe.models.families._reader import Reader


def _read(reader: Reader) -> ModelConfig:
    reader.accept("norm_topk_prob", True)
    moe = read_moe(reader, expert_width="intermediate_size", renormalize=True)
    layers = same_layers(reader, is_moe=True, window=read_window(reader))
    return decoder(reader, read_attention(reader), layers, moe=moe)


FAMILIES = (
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        read=_read,
        names={**ATTENTION, **MIXTRAL_EXPERTS},
        defaults={
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)
