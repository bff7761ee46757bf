"""A model of random weights as a folder that every engine opens: `python random_model.py SHAPE FOLDER`.

Weights are `load_format="dummy"`'s, fan-in normal with unit embeddings, in bf16: with the usual initialisation of 0.02
greedy decoding soon repeats one token, and all rows of a batch choose the same experts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from flexmoe.models import families
from flexmoe.models.loader import fill_dummy

# hidden size, layers, query and KV heads of 64, width of an expert, vocabulary. Labels: they hold 91 M and 521 M.
_SIZES = {"60M": (384, 8, 6, 2, 1024, 16384), "400M": (768, 12, 12, 4, 2048, 32000), "tiny": (64, 2, 2, 1, 64, 320)}
_NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
SHAPES = {name: dict(zip(_NAMES, sizes, strict=True)) for name, sizes in _SIZES.items()}
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


def make_model(shape: str, folder: Path, seed: int = 0) -> None:
    """Write config.json and model.safetensors into `folder`, which is made."""
    folder.mkdir(parents=True)
    hf_config = _COMMON | SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2), encoding="utf-8")
    config = families.read_config(hf_config)
    whole = {name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in families.parameters(config).items()}
    fill_dummy(whole, seed)
    stored = {}
    for name, piece in families.tensors(config).items():
        if ".mlp." not in name:  # other names of the same experts
            rows = whole[piece.param] if piece.expert is None else whole[piece.param][piece.expert]
            stored[name] = rows[piece.start : piece.start + piece.shape[0]].clone()
    words = {f"w{i}": i for i in range(config.vocab_size)}  # nobody reads them, but ours wants a tokenizer
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    make_model(sys.argv[1], Path(sys.argv[2]))
