"""The step that tiles are judged in: each stage's output is there and right, and memory nobody wrote is seen."""

from __future__ import annotations

import pytest
import torch

from flexmoe.bench import tune_step
from flexmoe.bench.kernel_timer import Timing
from flexmoe.bench.tune_step import MiniModel
from flexmoe.config.model import LayerConfig
from flexmoe.kernels.triton.norm_linear import DotTile
from flexmoe.kernels.triton.tiles import Measured, TileTable, linear_work
from flexmoe.models import fused, fused_experts
from tests.cpu.tiny_decoders import config
from tests.kernels.support import DEVICE, distance

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
CONFIG = config(layers=(LayerConfig(is_moe=True),) * 2, checkpoint_dtype="float32")


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> MiniModel:
    monkeypatch.setattr(tune_step, "_CONTEXT", 20)
    monkeypatch.setattr(tune_step, "_LONG_CONTEXT", 40)
    monkeypatch.setattr(tune_step, "_LAYERS", 1)
    timer = lambda launches, _least: Timing(10.0 * len(launches), 0.0, 0.0)
    return MiniModel(CONFIG, torch.float32, DEVICE, head=False, timer=timer)


def test_stages_agree_across_tiles(mini: MiniModel) -> None:
    assert mini.config.num_layers == 1
    inputs = mini.inputs(1)
    work = linear_work(torch.float32, CONFIG.qkv_size, CONFIG.hidden_size, norm=True)
    table = TileTable([Measured(work, 1, DotTile(16, 32, 16, splits=2, num_stages=2), 0.0, 0.0)])
    own, other = mini.decoder(TileTable(), 1), mini.decoder(table, 1)
    assert mini.microseconds(own, inputs) == 10.0
    assert mini.moved(1) > 0
    for stage, width in (("attention", CONFIG.hidden_size), ("router", 6)):
        expected = mini.output(own, inputs, stage)  # type: ignore[arg-type]
        assert expected.shape == (1, width)
        found = mini.output(other, inputs, stage)  # type: ignore[arg-type]
        assert not torch.equal(found, expected), "another tile rounds in another order"
        assert distance(found, expected) < 1e-5


def test_what_a_launch_leaves_out_is_seen(mini: MiniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = mini.inputs(1)
    decoder = mini.decoder(TileTable(), 1)
    assert mini.output(decoder, inputs, "feed").isfinite().all()
    monkeypatch.setattr(fused_experts, "expert_down_gemv", lambda *_, **__: None)
    monkeypatch.setattr(fused, "decode_attention", lambda *_, **__: None)
    assert mini.output(decoder, inputs, "attention").isnan().all()
