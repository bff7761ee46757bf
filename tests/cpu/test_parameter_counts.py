"""ModelConfig counts what transformers builds, for each preset and each tiny case. On the meta device: no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from flexmoe.config.model import ModelConfig
from flexmoe.models.families import read_config
from flexmoe.models.presets import PRESETS
from tests.cpu.tiny_models import CASES


def shapes(model_type: str, options: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The parameters of the transformers model, shared ones once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check(config: ModelConfig, built: Mapping[str, torch.Size]) -> None:
    assert config.num_parameters() == sum(shape.numel() for shape in built.values())
    active = 0.0
    for name, shape in built.items():
        if ".experts." in name:
            assert config.moe is not None
            active += shape.numel() * config.moe.top_k / config.moe.num_experts
        elif "embed_tokens" not in name or config.tie_embeddings:
            active += shape.numel()
    assert config.num_active_parameters() == round(active)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    options = {key: value for key, value in PRESETS[name].hf_config.items() if key != "model_type"}
    check(PRESETS[name].config, shapes(PRESETS[name].hf_config["model_type"], options))


@pytest.mark.parametrize("name", CASES)
def test_tiny_cases(name: str) -> None:
    case = CASES[name]
    check(read_config({"model_type": case.model_type, **case.config}), shapes(case.model_type, case.config))
