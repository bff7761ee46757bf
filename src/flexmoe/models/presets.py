"""Presets: well-known configurations carried along, to run with load_format="dummy". Data only, no torch.

Enters: a preset's name. Leaves: the config.json its model was published with, as a dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexmoe.config.model import ModelConfig
from flexmoe.models.families import read_config


@dataclass(frozen=True, slots=True)
class Preset:
    """A configuration without weights. hub_id: where the model with weights is."""

    name: str
    hub_id: str
    description: str
    hf_config: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        """The configuration, read as if from config.json."""
        return read_config(self.hf_config)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return self.config.num_parameters()

    @property
    def num_active_parameters(self) -> int:
        """Parameters that the decode step of one token reads."""
        return self.config.num_active_parameters()


_MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

_QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "use_sliding_window": False,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}

_OLMOE_1B_7B = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "attention_bias": False,
    "clip_qkv": None,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "eos_token_id": 50279,
    "torch_dtype": "bfloat16",
}

_TINYMISTRAL_6X248M = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "mixtral-8x7b",
            "mistralai/Mixtral-8x7B-v0.1",
            "Mixtral 8x7B: few large experts (8, two a token)",
            _MIXTRAL_8X7B,
        ),
        Preset(
            "qwen3-30b-a3b",
            "Qwen/Qwen3-30B-A3B",
            "Qwen3 30B-A3B: many small experts (128, eight a token)",
            _QWEN3_30B_A3B,
        ),
        Preset(
            "olmoe-1b-7b",
            "allenai/OLMoE-1B-7B-0924",
            "OLMoE 1B-7B: 64 small experts, eight a token",
            _OLMOE_1B_7B,
        ),
        Preset(
            "tinymistral-6x248m",
            "M4-ai/TinyMistral-6x248M",
            "TinyMistral 6x248M: the shape of the CMU 15-618 project (6 experts, two a token)",
            _TINYMISTRAL_6X248M,
        ),
    )
}
