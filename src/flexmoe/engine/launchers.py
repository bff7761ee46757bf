"""Who starts the ranks of a plan: this process, torchrun or Ray. Enters: options. Leaves: a Launcher.

The rest of the engine does not know which it is: devices and threads are asked of it, and all of them start ranks that
a Supervisor watches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from flexmoe.config.engine import EngineConfig
from flexmoe.engine.device import choose_device, physical_cores
from flexmoe.engine.worker import Worker
from flexmoe.errors import ConfigError
from flexmoe.parallel import launch
from flexmoe.parallel.launch import Launched


class Launcher(Protocol):
    """Starts ranks."""

    def device(self, name: str, num_ranks: int) -> torch.device:
        """Where they compute, without an index. Raises ConfigError if that cannot be for so many."""

    def threads(self, device: torch.device, num_ranks: int) -> int:
        """Threads of each rank, where the options leave that open; the same for all, so that they round alike."""

    def start(self, module: str, options: EngineConfig, timeout: float) -> Launched:
        """Start the plan's ranks. module: whose run() is the program of a new process. timeout: of collectives."""


def choose(name: str) -> Launcher:
    """The launcher of that name; "auto" is torchrun where it started this process. Raises if it cannot be had."""
    joined = launch.joined_by_torchrun()
    if name == "ray":
        return OnRay()
    if name == "torchrun" and not joined:
        raise ConfigError(
            "launcher='torchrun', but torchrun did not start this process as one of several; start the script with "
            "`torchrun --nproc-per-node=N SCRIPT`, or leave launcher out."
        )
    return UnderTorchrun() if joined and name != "spawn" else Spawn()


class Spawn:
    """Children of this process, on its own machine."""

    def device(self, name: str, num_ranks: int) -> torch.device:
        device = choose_device(name)
        if device.type == "cuda":
            _check_no_index(name, num_ranks)
            if num_ranks > torch.cuda.device_count():
                raise ConfigError(
                    f"the plan has {num_ranks} ranks (pipeline x data x tensor), but there are "
                    f"{torch.cuda.device_count()} GPUs; use lower degrees, launcher='ray' for more machines, or "
                    "device='cpu'."
                )
        return device

    def threads(self, device: torch.device, num_ranks: int) -> int:
        return max(1, physical_cores() // num_ranks)

    def start(self, module: str, options: EngineConfig, timeout: float) -> Launched:
        return launch.spawn(module, options.parallel.num_ranks, timeout)


class UnderTorchrun:
    """The processes that torchrun started, this one among them."""

    def device(self, name: str, num_ranks: int) -> torch.device:
        return choose_device(name)

    def threads(self, device: torch.device, num_ranks: int) -> int:
        return max(1, physical_cores() // launch.torchrun_setup(0.0).machine_size)

    def start(self, module: str, options: EngineConfig, timeout: float) -> Launched:
        """On the first process only does this return: the others serve as ranks, and exit."""
        setup, num_ranks = launch.torchrun_setup(timeout), options.parallel.num_ranks
        if setup.size != num_ranks:
            raise ConfigError(
                f"torchrun started {setup.size} processes, but the plan has {num_ranks} ranks (pipeline x data x "
                f"tensor); use --nproc-per-node={num_ranks}, or degrees that fit."
            )
        if setup.rank > 0:
            raise SystemExit(launch.report(setup, Worker))
        return launch.gather(setup, Worker)


class OnRay:
    """Processes on the machines of a Ray cluster. This one needs no GPU, even if they compute on GPUs."""

    def __init__(self) -> None:
        from flexmoe.parallel.ray import RayCluster  # only who asks for Ray needs it

        self._cluster = RayCluster()

    def device(self, name: str, num_ranks: int) -> torch.device:
        if name == "auto":
            return torch.device("cuda" if any(node.gpus for node in self._cluster.nodes) else "cpu")
        _check_no_index(name, num_ranks)
        return torch.device("cuda") if name == "cuda" else choose_device(name)

    def threads(self, device: torch.device, num_ranks: int) -> int:
        from flexmoe.parallel.ray import cpus_of_each

        return cpus_of_each(self._cluster.nodes, num_ranks, _gpus(device))

    def start(self, module: str, options: EngineConfig, timeout: float) -> Launched:
        from flexmoe.parallel.ray import Need

        plan, own = options.parallel, options.device
        assert own.threads is not None, "decided before"
        gpus = _gpus(torch.device(own.device))
        groups = plan.stage_size, plan.tensor_parallel_size
        need = Need(plan.num_ranks, groups, 0 if gpus else own.threads, gpus)
        model = options.load.model
        folder = Path(model) if model is not None and Path(model).is_absolute() else None
        return self._cluster.start(module, need, timeout, folder)


def _gpus(device: torch.device) -> int:
    """GPUs of one rank."""
    return 1 if device.type == "cuda" else 0


def _check_no_index(name: str, num_ranks: int) -> None:
    if name.startswith("cuda:"):
        raise ConfigError(f"device={name!r} names one GPU, but the plan has {num_ranks} ranks; use cuda.")
