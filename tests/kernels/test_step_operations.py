"""What operations add to a step: all of them are found, each once, and the decoder is whole again afterwards."""

from __future__ import annotations

import pytest
import torch

from flexmoe.bench.kernel_timer import Launch, Timing
from flexmoe.bench.machine_samples import step_samples
from flexmoe.bench.prompt_operations import PromptLayers
from flexmoe.bench.step_operations import OPERATIONS, Steps
from flexmoe.kernels.triton import norm_linear
from flexmoe.models import fused, fused_experts
from flexmoe.models.families import read_config
from tests.kernels.support import DEVICE

CONFIG = read_config(
    {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 48, "hidden_size": 32,
        "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu",
    }
)  # fmt: skip


class Clock:
    """Says that the n-th step that is timed took n milliseconds."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, launches: list[Launch], least: int) -> Timing:
        for launch in launches:
            launch()
        self.steps += 1
        return Timing(1e3 * self.steps, 0, 0)


@pytest.mark.parametrize(("rows", "middle"), [(1, "expert_down_gemv"), (3, "expert_down_grouped")])
def test_every_operation_adds_its_part(rows: int, middle: str) -> None:
    modules = fused, fused_experts
    before = [getattr(module, name) for module in modules for name in OPERATIONS if hasattr(module, name)]
    linear, clock = norm_linear.norm_linear, Clock()
    steps = Steps(CONFIG, DEVICE, 64, clock)
    steps.prepare(rows, 20)
    added = steps.added()
    assert list(added)[:4] == ["rest", "qkv", "decode_attention", "o"]
    assert list(added)[-1] == "head"
    assert middle in added
    assert clock.steps == len(added), "a step without any, and one more for each operation"
    assert added["rest"] == pytest.approx(1e-3)
    assert added["qkv"] == pytest.approx(1e-3 / CONFIG.num_layers)
    assert added["head"] == pytest.approx(1e-3)
    assert norm_linear.norm_linear is linear
    assert [getattr(module, name) for module in modules for name in OPERATIONS if hasattr(module, name)] == before
    assert {s.op.partition(".")[2] for s in step_samples(CONFIG, added, rows, 20)} == {
        "linear", "attention", "router", "experts",
    }  # fmt: skip


def test_one_operation_alone_needs_three_steps() -> None:
    clock = Clock()
    steps = Steps(CONFIG, DEVICE, 64, clock)
    steps.prepare(1, 20)
    assert list(steps.added("decode_attention")) == ["rest", "decode_attention"]
    assert clock.steps == 3


def test_a_prompt_goes_through_the_kernels_behind_others() -> None:
    layers = PromptLayers(CONFIG, 32, DEVICE, torch.float32)
    rows = layers.rows(5, before=16)
    assert rows.spans.spans.tolist() == [[0, 5, 16, 0]]
    logits = layers.step(rows)
    assert logits.shape == (1, CONFIG.vocab_size)
    assert logits.isfinite().all()
    assert not torch.equal(layers.step(layers.rows(5)), logits)
