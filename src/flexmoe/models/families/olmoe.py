"""OLMoE: every layer is MoE; q/k norms over the whole projection; clip_qkv clamps q, k and v after those norms.

Refused by name: sliding windows, shared experts, a head_dim other than hidden_size / num_attention_heads (the sizes
of the q/k norms are tied to it).
"""

from __future__ import annotations

from flexmoe.config.model import ModelConfig
from flexmoe.models.families._common import Family, decoder, read_attention, read_moe, same_layers
from flexmoe.models.families._names import ATTENTION, EXPERTS
from flexmoe.models.families._reader import Reader


def _read(reader: Reader) -> ModelConfig:
    reader.accept("head_dim", reader.count("hidden_size") // reader.count("num_attention_heads"))
    bias = reader.flag("attention_bias")
    clip = None if reader.get(float, "clip_qkv") is None else reader.positive("clip_qkv")
    attention = read_attention(reader, qkv_bias=bias, out_bias=bias, qk_norm="full", clip_qkv=clip)
    moe = read_moe(reader, expert_width="intermediate_size", renormalize=reader.flag("norm_topk_prob"))
    return decoder(reader, attention, same_layers(reader, is_moe=True), moe=moe)


FAMILIES = (
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        read=_read,
        names={**ATTENTION, **EXPERTS},
        defaults={
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            "eos_token_id": 50279,
        },
    ),
)
