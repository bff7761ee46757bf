"""The model families, as data for the one decoder. Enters: config.json. Leaves: ModelConfig and names. No torch here.

A family is a page: how its config.json is read (`read`) and how its checkpoint's tensors are called (`names`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexmoe.config.model import ModelConfig
from flexmoe.errors import ConfigError, UnsupportedModelError
from flexmoe.models.families import layout, llama, mixtral, olmoe, qwen_moe
from flexmoe.models.families._common import Family
from flexmoe.models.families._reader import Reader

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (*mixtral.FAMILIES, *olmoe.FAMILIES, *qwen_moe.FAMILIES, *llama.FAMILIES)
}


def read_config(hf_config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """config.json (and generation_config.json, whose end-of-sequence tokens win) as a ModelConfig.

    Errors: UnsupportedModelError for an architecture or a feature the decoder lacks, ConfigError for a missing or
    malformed value. Unknown keys are named in the log.
    """
    family = _family(hf_config)
    reader = Reader(hf_config, family.defaults, family.model_type, "config.json")
    config = replace(family.read(reader), architecture=family.architecture)
    reader.finish()
    generation = Reader(generation_config or {}, {}, family.model_type, "generation_config.json")
    return replace(config, eos_token_ids=generation.integers("eos_token_id") or config.eos_token_ids)


def tensors(config: ModelConfig) -> dict[str, layout.Piece]:
    """Every tensor name a checkpoint of this model may hold, with the piece of our parameters that it fills."""
    return layout.tensors(config, FAMILIES[config.family].names)


def parameters(config: ModelConfig) -> dict[str, layout.Parameter]:
    """Every parameter of the decoder that `config` describes, by name."""
    return layout.parameters(config)


def _family(hf_config: Mapping[str, Any]) -> Family:
    """The family by architectures[0], or by model_type where there is none; they must agree."""
    reader = Reader(hf_config, {}, "decoder", "config.json")
    model_type = reader.get(str, "model_type")
    architectures = reader.get(list, "architectures")
    if not architectures:
        if model_type is None:
            raise ConfigError("config.json has neither architectures nor model_type; it does not describe a model.")
        if model_type not in FAMILIES:
            raise UnsupportedModelError(f"model_type {model_type!r} is not supported; supported: {_known()}.")
        return FAMILIES[model_type]
    for family in FAMILIES.values():
        if family.architecture == architectures[0]:
            if model_type not in (None, family.model_type):
                raise ConfigError(
                    f"config.json: architectures={architectures} belongs to model_type={family.model_type!r}, "
                    f"but model_type={model_type!r}."
                )
            return family
    raise UnsupportedModelError(f"architecture {architectures[0]!r} is not supported; supported: {_known()}.")


def _known() -> str:
    return ", ".join(f"{family.architecture} ({family.model_type})" for family in FAMILIES.values())
