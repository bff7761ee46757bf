"""What a decode step of one rank launches, in order: that there can be several, and counting, costs it nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.kernels.triton.tiles import TileTable
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models import fused as fused_module
from flexmoe.models import fused_data_ranks as data_module
from flexmoe.models import fused_experts as experts_module
from flexmoe.models import fused_grouped as grouped_module
from flexmoe.models import fused_vocabulary as vocabulary_module
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import DeviceRows
from flexmoe.models.fused import FusedDecoder
from flexmoe.moe.load import ExpertCounter
from flexmoe.parallel.mesh import Mesh
from tests.cpu.tiny_decoders import config
from tests.kernels.support import DEVICE

ATTENTION = ["norm_linear", "decode_attention", "norm_linear"]
ALONE = [*ATTENTION, "route", "expert_gate_up_gemv", "expert_down_gemv"]
GROUPED = [
    *ATTENTION, "route", "topk", "group_by_expert", "expert_gate_up_grouped", "expert_down_grouped", "combine_norm",
]  # fmt: skip
HEAD = ["norm_linear", "greedy"]
OF_FUSED = ("count_choices", "decode_attention", "rms_norm")
OF_EXPERTS = (
    "combine", "combine_norm", "expert_down_gemv", "expert_gate_up_gemv", "group_by_expert", "route", "topk",
    "topk_by_expert",
)  # fmt: skip
OF_GROUPED = ("expert_down_grouped", "expert_gate_up_grouped")
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "expand", "select", "slice", "split", "t", "transpose",
    "unsqueeze", "view",
}  # fmt: skip


class Seen(TorchDispatchMode):
    """Notes torch's own operations, but for those that only look at memory in another way."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self._launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self._launched.append(f"torch.{name}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the order of launches, of which none is carried out."""
    found: list[str] = []

    def replace(module: Any, name: str) -> None:
        monkeypatch.setattr(module, name, lambda *_, **__: found.append(name))

    for name in OF_FUSED:
        replace(fused_module, name)
    for name in OF_EXPERTS:
        replace(experts_module, name)
    for name in OF_GROUPED:
        replace(grouped_module, name)
    replace(data_module, "combine_norm")
    replace(fused_module.norm_linear, "norm_linear")
    replace(vocabulary_module, "embed")
    for name in ("greedy", "best", "winner"):
        replace(vocabulary_module.argmax, name)
    return found


def step(
    model: ModelConfig, rows: int, launched: list[str], plan: ParallelPlan | None = None, *, count: bool = False
) -> list[str]:
    mesh = Mesh(plan or ParallelPlan())  # of several ranks the others are only imagined
    decoder = Decoder(model, mesh.plan, "reference", 64, dtype=torch.float32, device=DEVICE, mesh=mesh).eval()
    for parameter in decoder.parameters():
        parameter.data.zero_()
    fused = FusedDecoder(decoder, 64, DEVICE, TileTable(), max_rows=rows)
    cache = KVCache(mesh.shard(model).local, 4, 4, torch.float32, DEVICE)
    given = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    of_rows = DeviceRows(given, given.int(), given.int(), given.int(), given[:1].int())
    counter = ExpertCounter(model, DEVICE) if count else None
    with torch.no_grad(), Seen(launched):
        fused.step(of_rows, None, cache)
        if counter is not None:
            fused.count(rows, counter)
    return launched


def test_one_rank_with_a_few_rows(launched: list[str]) -> None:
    dense = [*ATTENTION, "rms_norm", "torch.empty", "norm_linear", "torch.silu", "torch.mul_", "norm_linear"]
    assert step(config(), 2, launched) == ["embed", *ALONE, *dense, *HEAD]


def test_one_rank_with_many_rows(launched: list[str]) -> None:
    model = config(layers=(LayerConfig(is_moe=True),) * 2)
    assert step(model, 12, launched) == ["embed", *GROUPED, *GROUPED, *HEAD]


def test_counting_is_one_launch_behind_a_step(launched: list[str]) -> None:
    model = config(layers=(LayerConfig(is_moe=True),) * 2)
    assert step(model, 2, launched, count=True) == ["embed", *ALONE, *ALONE, *HEAD, "count_choices"]


@pytest.mark.parametrize("plan", [ParallelPlan(2), ParallelPlan(2, 2)], ids=["tensor", "expert"])
def test_a_rank_adds_a_sum_after_each_part(launched: list[str], plan: ParallelPlan) -> None:
    """The collectives themselves are not there. Where experts are needs no launch of its own."""
    model = config(layers=(LayerConfig(is_moe=True),))
    expected = ["embed", "torch.copy_", *ATTENTION, "torch.add_", *ALONE[3:], "torch.add_", "norm_linear", "best"]
    found = step(model, 2, launched, plan)
    assert found[: len(expected)] == expected
    assert found[-1] == "winner"


def test_data_ranks_gather_rows_and_get_their_sums_back(launched: list[str]) -> None:
    """The collectives themselves are not there, but what stands for them: copies."""
    model = config(layers=(LayerConfig(is_moe=True),))
    found = step(model, 1, launched, ParallelPlan(data_parallel_size=2, expert_parallel_size=2))
    stand_ins = {"torch.new_empty", "torch.repeat", "torch.copy_", "torch.unfold"}
    expected = ["torch.clamp", "embed", *ATTENTION, "rms_norm", "route", "expert_gate_up_gemv", "expert_down_gemv"]
    assert [name for name in found if name not in stand_ins] == [*expected, "combine_norm", *HEAD]
