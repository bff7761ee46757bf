"""What `flexmoe bench machine` measures, the most telling first. Enters: a kind of device. Leaves: shapes. No torch.

Whole models, and what one rank holds of them: narrower experts and fewer heads as with tensor ranks, fewer experts as
with expert ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import Shard
from flexmoe.models.families import read_config
from flexmoe.models.presets import PRESETS

_GPU_MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b")
_LAYERS = 6


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of few layers. name: where it comes from."""

    name: str
    config: ModelConfig


def gpu_shapes() -> list[Shape]:
    """The reference models whole."""
    return [Shape(name, _layers(PRESETS[name].config, _LAYERS)) for name in _GPU_MODELS]


def gpu_slices() -> Iterator[Shape]:
    """What a rank has of them."""
    for degree in (8, 2, 4):
        for name in _GPU_MODELS:
            config = PRESETS[name].config
            yield Shape(f"{name}, tensor {degree}", _layers(_tensor_slice(config, degree), _LAYERS))
            if config.moe is not None and config.moe.num_experts // degree > 1:
                yield Shape(f"{name}, expert {degree}", _layers(_expert_slice(config, degree), _LAYERS))


def builtin_shape() -> Shape:
    """The model that comes with the package, with all its layers."""
    text = (files("flexmoe") / "assets" / "builtin" / "config.json").read_text(encoding="utf-8")
    return Shape("built-in model", read_config(json.loads(text)))


def cpu_shapes() -> list[Shape]:
    """Small ones: experts many and few, wide and narrow, layers and heads that caches hold and that they do not."""
    made = [
        _made(1024, 8, 2, 512, 4, vocab=32768), _made(1024, 32, 4, 512, 3, vocab=8192),
        _made(2048, 16, 4, 768, 2, vocab=32768),
    ]  # fmt: skip
    named = [Shape(f"hidden {c.hidden_size}, {c.moe.num_experts if c.moe else 0} experts", c) for c in made]
    return [builtin_shape(), *named]


def cpu_slices(ranks: int) -> list[Shape]:
    """What one of so many ranks has of the smaller ones, by tensor and by expert."""
    found = []
    for shape in cpu_shapes()[:2]:
        found.append(Shape(f"{shape.name}, tensor {ranks}", _tensor_slice(shape.config, ranks)))
        found.append(Shape(f"{shape.name}, expert {ranks}", _expert_slice(shape.config, ranks)))
    return found


def _made(hidden: int, experts: int, top_k: int, width: int, layers: int, *, vocab: int) -> ModelConfig:
    return read_config(
        {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": vocab,
            "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64, "num_key_value_heads": max(2, hidden // 256),
            "num_local_experts": experts, "num_experts_per_tok": top_k, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu",
        }
    )  # fmt: skip


def _layers(config: ModelConfig, count: int) -> ModelConfig:
    chosen = [layer for layer in config.layers if layer.is_moe][:count]
    return replace(config, layers=tuple(chosen))


def _tensor_slice(config: ModelConfig, degree: int) -> ModelConfig:
    return Shard(ParallelPlan(degree), config).local


def _expert_slice(config: ModelConfig, degree: int) -> ModelConfig:
    """As many pairs for each expert as on one rank of so many."""
    moe = config.moe
    assert moe is not None
    fewer = replace(moe, num_experts=moe.num_experts // degree, top_k=max(1, moe.top_k // degree))
    return replace(config, moe=fewer)
