"""Settings for tests of the planner: machines by their figures, not by tables that are measured anew now and then."""

from __future__ import annotations

from dataclasses import replace

from flexmoe.config.machine import DeviceSpec, Link, Machine
from flexmoe.config.model import ModelConfig
from flexmoe.models.presets import PRESETS
from flexmoe.planner.estimate import Promise
from flexmoe.planner.planning import Setting
from flexmoe.planner.search import Objective, Question
from flexmoe.planner.workload import Workload

GPU = DeviceSpec("cuda", "a GPU", 80 << 30, 3e12, {"bfloat16": 6e14}, 3e-6, 5e-5)
FAST, SLOW = Link("fast", 8, 1e-5, 3e11), Link("slow", 0, 3e-5, 2e10)


def machine(gpus: int = 8, *, link: Link = FAST, memory_gib: float = 80) -> Machine:
    """GPUs on nodes of eight, which a slow link connects."""
    device = replace(GPU, memory_bytes=round(memory_gib * 2**30))
    return Machine("test", 8, 1, device, (link, SLOW), reserve_bytes=2**30).resized(gpus)


def setting(model: str = "mixtral-8x7b", gpus: int = 8, *, link: Link = FAST, memory_gib: float = 80) -> Setting:
    """A preset on such a machine."""
    return Setting.of(model, PRESETS[model].config, machine(gpus, link=link, memory_gib=memory_gib))


def question(
    asked: Setting, objective: Objective = "throughput", *, budget: int | None = None, one_engine: bool = False,
    only_data_parallel: bool = False, **workload: float,
) -> Question:  # fmt: skip
    """About 512 + 128 tokens."""
    wanted = Workload(**{"rate": 4.0, **workload})  # type: ignore[arg-type]
    return Question(
        space=asked.space(one_engine=one_engine, only_data_parallel=only_data_parallel),
        demand=wanted.demand(),
        promise=Promise.from_ms(wanted.slo_ttft_ms, wanted.slo_tpot_ms),
        objective=objective,
        budget=budget,
    )


def olmoe() -> ModelConfig:
    """64 experts, eight a token."""
    return PRESETS["olmoe-1b-7b"].config
