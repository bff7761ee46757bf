"""An engine, planned where that is asked for. Enters: options of `LLM`. Leaves: an Engine.

`plan="auto"` searches a plan for the machine; `machine` alone lets the engine compare its steps with their prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch

from flexmoe.config.engine import EngineConfig
from flexmoe.config.machine import Machine
from flexmoe.config.plan import DEGREES, ParallelPlan
from flexmoe.engine.device import choose_device
from flexmoe.engine.engine import Engine
from flexmoe.errors import ConfigError
from flexmoe.models.hub import open_model
from flexmoe.planner.estimate import Promise
from flexmoe.planner.planning import Setting
from flexmoe.planner.search import OBJECTIVES, Question
from flexmoe.planner.workload import Workload

_log = logging.getLogger(__name__)

# Where nobody says what there is.
_ASSUMED = {"cuda": "h200x8", "cpu": "cpu2"}
_OWN = ("machine", "workload", "objective", "search_budget")


def make_engine(options: Mapping[str, Any]) -> Engine:
    """options: of `EngineConfig.from_options`, and besides

    plan="auto": the best plan for the machine, as one engine on all its devices that are here. machine: a shipped one's
    name, or a machine file; with None one is assumed, and logged. workload: a file, or a
    Workload. objective: "throughput", "tpot" or "ttft". search_budget: plans to cost at most.

    Raises ConfigError for what does not go together, and what the engine raises at its start.
    """
    own = {name: options[name] for name in _OWN if options.get(name) is not None}
    rest = {name: value for name, value in options.items() if name not in _OWN}
    auto = rest.get("plan") == "auto"
    if auto:
        del rest["plan"]
        _check_no_degrees(rest)
    elif set(own) - {"machine"}:
        raise ConfigError(f"{', '.join(sorted(set(own) - {'machine'}))} say how to plan; give plan='auto' with them.")
    config = EngineConfig.from_options(rest)
    if not auto and "machine" not in own:
        return Engine(config)
    setting = _setting(config, own.get("machine"))
    if auto:
        config = replace(config, parallel=_search(setting, config, own))
    engine = Engine(config)
    if "machine" in own:  # one that was assumed predicts nothing of this one
        dtype = engine.describe()["dtype"]  # which the engine chose, perhaps by a probe
        one_pass = config.device.one_pass
        engine.watch(replace(setting, dtype=dtype).steps(config.parallel, config.scheduler, one_pass=one_pass).terms)
    return engine


def assumed_machine(kind: str) -> Machine:
    """A machine that comes with the package, for a kind of device, with a line in the log."""
    name = _ASSUMED[kind]
    _log.warning("no machine is named, so this one is taken for %s; measure yours with `flexmoe bench machine`.", name)
    return Machine.load(name)


def _check_no_degrees(options: Mapping[str, Any]) -> None:
    given = [name for name in (*DEGREES, "moe_dispatch") if name in options]
    if given:
        raise ConfigError(f"plan='auto' chooses {given[0]} itself; leave one of them out.")


def _setting(config: EngineConfig, machine: object) -> Setting:
    """The model on the machine, in the number format that the engine will have."""
    device = config.device
    if machine is not None and not isinstance(machine, str | PathLike):
        raise ConfigError(f"machine={machine!r} is neither the name of a machine nor a file.")
    found = assumed_machine(choose_device(device.device).type) if machine is None else Machine.load(str(machine))
    source = open_model(replace(config.load, load_format="dummy"))
    return Setting.of(source.name, source.config, found, device.dtype, device.quantization)


def _search(setting: Setting, config: EngineConfig, own: Mapping[str, Any]) -> ParallelPlan:
    workload = own.get("workload", Workload())
    if not isinstance(workload, Workload):
        workload = Workload.read(workload)
    objective = own.get("objective", "throughput")
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r} is not one of {', '.join(OBJECTIVES)}.")
    setting = setting.resized(_devices(config, setting.machine))
    found = setting.search(
        Question(
            space=setting.space(one_engine=True),
            demand=workload.demand(),
            promise=Promise.from_ms(workload.slo_ttft_ms, workload.slo_tpot_ms),
            objective=objective,
            limits=config.scheduler.on(setting.machine.device.kind),
            budget=own.get("search_budget"),
        )
    )
    best = found.best
    _log.info("plan for %s: %s, of %d", setting.machine.name, best.candidate.name, len(found.ranking))
    return best.candidate.plan


def _devices(config: EngineConfig, machine: Machine) -> int:
    """Of the machine's devices those that are here."""
    kind = choose_device(config.device.device).type
    if kind != machine.device.kind:
        raise ConfigError(f"the machine {machine.name} computes on {machine.device.kind}, this engine on {kind}.")
    return min(machine.num_devices, torch.cuda.device_count()) if kind == "cuda" else machine.num_devices
