"""A model of random weights as a folder that every engine opens. Enters: the name of a shape. Leaves: the folder.

Weights are `load_format="dummy"`'s, fan-in normal with unit embeddings, in bf16: with the usual initialisation of 0.02
greedy decoding soon repeats one token, and all rows of a batch choose the same experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from flexmoe.models import families
from flexmoe.models.loader import fill_dummy
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, int]] = {
    "60M": {
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "vocab_size": 16384,
    },
    "400M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 32000,
    },
}
_COMMON: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def make_model(shape: dict[str, int], folder: Path, seed: int = 0) -> Path:
    """Write config.json and model.safetensors into `folder`, which is made."""
    folder.mkdir(parents=True)
    hf_config = _COMMON | shape
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2), encoding="utf-8")
    config = families.read_config(hf_config)
    whole = {name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in families.parameters(config).items()}
    fill_dummy(whole, seed)
    stored = {}
    for name, piece in families.tensors(config).items():
        if ".mlp." not in name:  # other names of the same experts
            rows = whole[piece.param] if piece.expert is None else whole[piece.param][piece.expert]
            stored[name] = rows[piece.start : piece.start + piece.shape[0]].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
