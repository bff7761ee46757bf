"""flexmoe.serve.init: what FlexFlow accepts and refuses, defaults in the caller's dict, and what is said once."""

from __future__ import annotations

import logging

import pytest

from flexmoe.errors import ConfigError, FlexMoEError
from flexmoe.serve import settings
from flexmoe.serve.core import FFConfig, FFModel
from flexmoe.serve.settings import init
from flexmoe.serve.types import PeftSupportMode

REQUIRED = {"num_gpus": 1, "memory_per_gpu": 14000, "zero_copy_memory_per_node": 30000}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.process, "settings", {})
    monkeypatch.setattr(settings.process, "_said", set())


def test_a_dict_is_filled_with_defaults_and_keeps_what_is_not_ours() -> None:
    config = {**REQUIRED, "llm_model": "x", "prompt": "", "fusion": False}
    assert init(config) is None
    assert config["legion_utility_processors"] == 8
    assert config["num_cpus"] == 4
    assert config["tensor_parallelism_degree"] == config["expert_parallelism_degree"] == 1
    assert config["offload_reserve_space_size"] == 8 * 1024  # MB
    assert config["peft_support_mode"] is PeftSupportMode.PEFT_DISABLED
    assert (config["fusion"], config["llm_model"]) == (False, "x")


def test_keywords() -> None:
    init(**REQUIRED, tensor_parallelism_degree=4, num_cpus=None)
    assert settings.process.get("tensor_parallelism_degree") == 4
    assert FFConfig().tensor_parallelism_degree == 4


def test_the_clock_counts_microseconds() -> None:
    start = FFConfig().get_current_time()
    assert 0 < FFConfig().get_current_time() - start < 1e6


@pytest.mark.parametrize(
    ("config", "options", "kind", "said"),
    [
        (REQUIRED, {"num_gpus": 1}, ValueError, "both a dict and the keywords num_gpus"),
        ("config.json", {}, TypeError, "a str, not a dict"),
        (None, {"num_gpus": 1}, ValueError, "lacks memory_per_gpu, zero_copy_memory_per_node"),
        (None, {**REQUIRED, "num_gpus": "1"}, TypeError, "num_gpus='1' is a str"),
        (None, {**REQUIRED, "num_gpus": True}, TypeError, "is a bool"),
        (None, {**REQUIRED, "memory_per_gpu": 0}, ValueError, "memory_per_gpu=0 is not positive"),
        (None, {**REQUIRED, "tensor_parallelism_degree": -1}, ValueError, "not positive"),
        (None, {**REQUIRED, "tensor_paralelism_degree": 2}, TypeError, "did you mean 'tensor_parallelism_degree'"),
        (None, {**REQUIRED, "moe_strategy": "both"}, ValueError, "auto, tensor, expert, hybrid"),
        ({**REQUIRED, "use_8bit_quantization": True, "use_4bit_quantization": True}, {}, ValueError, "set one of them"),
        ({**REQUIRED, "enable_peft": True}, {}, NotImplementedError, "merge_and_unload"),
        ({**REQUIRED, "peft_support_mode": "PEFT_ENABLED_INFERENCE_ONLY"}, {}, NotImplementedError, "PEFT_DISABLED"),
    ],
)
def test_wrong_use(config: object, options: dict[str, object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        init(config, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, FlexMoEError)
    assert not settings.process.initialized


def test_what_has_no_effect_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        init({**REQUIRED, "fusion": True, "num_cpus": 4, "offload": False, "search_alpha": 1.2, "llm_model": "x"})
    said = [record.getMessage() for record in caplog.records]
    assert said[:3] == [
        "no effect in FlexMoE: num_cpus, fusion.",
        "no effect, for the search costs every plan within its budget: search_alpha.",
        "keys that init leaves alone: llm_model.",
    ]
    assert len(said) == 4
    assert said[3].startswith("init was called again")


def test_a_graph_class_says_what_to_use_instead() -> None:
    with pytest.raises(ConfigError, match=r"FFModel builds .* Use LLM\(model_name\)"):
        FFModel(FFConfig())
