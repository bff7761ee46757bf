"""A rank of the tests' pool: a Worker that also calls functions of test modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import MutableSequence
from typing import Any

import torch

from flexmoe.config.engine import EngineConfig
from flexmoe.config.plan import DEGREES, ParallelPlan
from flexmoe.engine.worker import ChildWorker
from flexmoe.parallel.mesh import Mesh
from flexmoe.parallel.rank import Setup, main
from tests.interpreter import hasten

CPU = torch.device("cpu")

hasten()


class PoolWorker(ChildWorker):
    """Beside an engine's commands: "call" a function with this worker and keyword arguments."""

    def __init__(self, setup: Setup, beats: MutableSequence[int]) -> None:
        super().__init__(setup, beats)
        self._meshes: dict[tuple[int, ...], Mesh] = {}

    def handle(self, command: str, payload: Any) -> Any:
        if command != "call":
            return super().handle(command, payload)
        module, name, arguments = payload
        torch.set_num_threads(1)
        torch.manual_seed(0)
        return getattr(importlib.import_module(module), name)(self, **arguments)

    def mesh_of(self, plan: ParallelPlan) -> Mesh:
        """The groups of a plan. They are kept: on gloo new ones take longer than most tests."""
        key = tuple(getattr(plan, name) for name in DEGREES)
        if key not in self._meshes:
            self._meshes[key] = self.connect(EngineConfig(parallel=plan), CPU)
            self.mesh = None
        kept = self._meshes[key]
        kept.plan = plan
        kept.traffic.take()
        return kept


def run() -> None:
    main(PoolWorker, sys.argv[1:])
