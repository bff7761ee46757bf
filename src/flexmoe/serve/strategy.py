"""FlexFlow's search keys. Enters: settings of `init`, a model. Leaves: the plan in force, also in a file.

import_strategy is a plan's file. search_budget (plans to cost; -1: all) and only_data_parallel search one, over
num_gpus devices of the machine in machine_model_file. export_strategy gets the plan, however it was found.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.machine import Machine
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.serve.settings import check_strategy, wants_search

_log = logging.getLogger("flexmoe.serve")

# Where machine_model_file is left out: FlexFlow has constants for that case.
_ASSUMED = {True: "h200x8", False: "cpu2"}
_MB = 2**20


def plan_in_force(
    settings: Mapping[str, Any], degrees: ParallelPlan, model: ModelConfig, limits: SchedulerConfig, dtype: str,
    *, cuda: bool,
) -> ParallelPlan:  # fmt: skip
    """The plan imported, searched, or of the degrees given; exported where that is wanted. Raises ConfigError."""
    check_strategy(settings)
    plan = degrees
    if settings.get("import_strategy"):
        plan = ParallelPlan.read(settings["import_strategy"])
    elif wants_search(settings):
        plan = _search(settings, model, limits, dtype, cuda=cuda)
    if settings.get("export_strategy"):
        plan.write(settings["export_strategy"])
    return plan


def _search(
    settings: Mapping[str, Any], model: ModelConfig, limits: SchedulerConfig, dtype: str, *, cuda: bool
) -> ParallelPlan:
    # Imported here: numpy and the planner, which most scripts never ask.
    from flexmoe.planner.estimate import Promise
    from flexmoe.planner.planning import Setting
    from flexmoe.planner.search import Question
    from flexmoe.planner.workload import Workload

    machine = Machine.load(str(settings.get("machine_model_file") or _ASSUMED[cuda]))
    if cuda and settings.get("memory_per_gpu"):
        memory = min(machine.device.memory_bytes, settings["memory_per_gpu"] * _MB)
        machine = replace(machine, device=replace(machine.device, memory_bytes=memory))
    setting = Setting.of(model.architecture, model, machine, dtype).resized(settings.get("num_gpus") or 1)
    only_data = bool(settings.get("only_data_parallel"))
    longest = limits.max_model_len or model.max_position
    workload = Workload(input_len=(1, max(1, longest // 2)), output_len=(1, max(1, longest - longest // 2)))
    budget = settings.get("search_budget") or -1
    found = setting.search(
        Question(
            space=setting.space(one_engine=True, only_data_parallel=only_data), demand=workload.demand(),
            promise=Promise(), objective="tpot", limits=limits, budget=None if budget == -1 else budget,
        )
    )  # fmt: skip
    best = found.best
    _log.info(
        "strategy for %s: %s, %.3g ms a token predicted, the best of %d",
        machine.name, best.candidate.name, 1e3 * best.tpot, len(found.ranking),
    )  # fmt: skip
    return best.candidate.plan
