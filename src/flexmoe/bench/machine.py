"""Measures this machine for the planner. Enters: a device, ranks, seconds. Leaves: a Machine (config/machine.py)."""

from __future__ import annotations

from dataclasses import replace

import torch

from flexmoe.bench.collectives import measured_links
from flexmoe.bench.machine_cpu import measure_cpu
from flexmoe.bench.machine_jobs import Notify
from flexmoe.bench.machine_serving import measure_serving
from flexmoe.config.machine import Machine
from flexmoe.engine.device import choose_device, computing_on

_SECONDS = {"cuda": 540.0, "cpu": 75.0}
_SERVING_SECONDS = 15.0


def measure(name: str, device: str, ranks: int, seconds: float | None, notify: Notify) -> Machine:
    """Within about `seconds` (None: 540 on a GPU, 75 on a CPU), exchanges of ranks and a server apart.

    Raises ConfigError.
    """
    chosen = choose_device(device)
    limit = _SECONDS[chosen.type] if seconds is None else seconds
    return with_server(_measure_device(name, chosen, ranks, limit, notify), device, limit, notify)


def with_server(machine: Machine, device: str, seconds: float | None, notify: Notify) -> Machine:
    """The machine with what a server adds, within about `seconds` or 15; where it cannot be measured, as it is."""
    limit = min(seconds or _SERVING_SECONDS, _SERVING_SECONDS)
    return replace(machine, serving=measure_serving(str(choose_device(device)), limit, notify) or machine.serving)


def _measure_device(name: str, device: torch.device, ranks: int, seconds: float, notify: Notify) -> Machine:
    if device.type == "cpu":
        return measure_cpu(name, ranks, seconds, notify)
    # Imported here: only GPUs need triton.
    from flexmoe.bench.machine_gpu import measure_gpu

    with computing_on(device):
        found = measure_gpu(name, device, seconds, notify)
    if ranks == 1:
        return found
    return replace(found, devices_per_node=ranks, links=measured_links(ranks, "cuda", notify))
