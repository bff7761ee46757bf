"""Presets: their configurations, published sizes, and how the hub hands them out."""

from __future__ import annotations

import pytest

from flexmoe.config.engine import LoadConfig
from flexmoe.errors import CheckpointError
from flexmoe.models.hub import open_model
from flexmoe.models.presets import PRESETS


def test_the_four_presets() -> None:
    assert list(PRESETS) == ["mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "tinymistral-6x248m"]
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert "\n" not in preset.description
        assert preset.hub_id.count("/") == 1
        assert preset.config.moe is not None
        assert preset.config.checkpoint_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # the model cards say 46.7B / 12.9B, 30.5B / 3.3B and 6.9B / 1.3B, counting the embedding table as active
        ("mixtral-8x7b", 46_702_792_704, 12_748_853_248),
        ("qwen3-30b-a3b", 30_532_122_624, 3_041_867_776),
        ("olmoe-1b-7b", 6_919_161_856, 1_178_994_688),
        ("tinymistral-6x248m", 1_003_062_272, 366_314_496),
    ],
)
def test_parameter_counts(name: str, total: int, active: int) -> None:
    assert PRESETS[name].num_parameters == total
    assert PRESETS[name].num_active_parameters == active


def test_a_preset_opens_without_files() -> None:
    source = open_model(LoadConfig(model="olmoe-1b-7b", load_format="dummy"))
    assert (source.name, source.folder, source.matches) == ("olmoe-1b-7b", None, ())
    assert source.config.attention.qk_norm == "full"
    assert source.config == PRESETS["olmoe-1b-7b"].config


def test_a_preset_has_no_weights_to_load() -> None:
    with pytest.raises(CheckpointError, match=r"\(--load-format dummy\), or the model 'allenai/OLMoE"):
        open_model(LoadConfig(model="olmoe-1b-7b"))
