"""One rank of an engine. Enters: commands of the driver, see engine/ranks.py. Leaves: reports, and tokens.

    start   join the others, load this rank's share of the model; answers a RankReport
    step    compute one step; the ranks that sample answer a SampleOutput once it is there, the others nothing
    traffic answers the bytes sent since the last call, by label
    count   count the choices of experts from now on, or no more; answers None
    loads   answers what was counted, if no other rank has counted the same rows
    stop    let go of the model, so that another may be started

`run` is the whole program of a child; under torchrun the user's own process serves.
"""

from __future__ import annotations

import sys
from collections.abc import MutableSequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexmoe.config.engine import EngineConfig
from flexmoe.config.routing import LayerLoad
from flexmoe.engine.collector import leave_out, take_in
from flexmoe.engine.cuda_graph import GraphFlight
from flexmoe.engine.device import choose_device
from flexmoe.engine.model_runner import ModelRunner
from flexmoe.engine.startup import start
from flexmoe.engine.wire import WireParts, unpack
from flexmoe.errors import FlexMoEError
from flexmoe.parallel import mesh as meshes
from flexmoe.parallel.mesh import Mesh
from flexmoe.parallel.rank import SILENT, Later, Setup, main


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank runs with. cache_bytes: of its own KV cache. max_ahead: decodes of a step that may follow another."""

    num_blocks: int
    cache_bytes: int
    threads: int
    backend: str
    decode_kernels: str
    prompt_kernels: str
    max_model_len: int
    max_ahead: int


class Worker:
    """Holds a rank's model and runs steps of it."""

    def __init__(self, setup: Setup, beats: MutableSequence[int]) -> None:
        self.setup, self._beats = setup, beats
        self.mesh: Mesh | None = None
        self.runner: ModelRunner | None = None

    def handle(self, command: str, payload: Any) -> Any:
        """Carry out one command of the driver."""
        if command == "step":
            return self.step(payload)
        if command == "start":
            return self.start(payload)
        if command == "traffic":
            return self.mesh.traffic.take() if self.mesh else {}
        if command == "count":
            return self.runner.count_experts(payload) if self.runner else None
        if command == "loads":
            return self.loads(payload)
        assert command == "stop", f"unknown command {command!r}"
        return self.stop()

    def start(self, options: EngineConfig) -> RankReport:
        """Load this rank's share of the model. All ranks are told at once."""
        options = self._on_own_device(options)
        device = choose_device(options.device.device)
        self.connect(options, device)
        started = start(options, self.mesh)
        graphed = started.graphed
        self.runner = ModelRunner(
            started.model, started.cache, started.device, graphed, started.prompts, one_pass=options.device.one_pass
        )
        return RankReport(
            started.num_blocks, started.cache.num_bytes, started.threads, started.backend, started.decode_kernels,
            started.prompt_kernels, started.max_model_len, 0 if graphed is None else graphed.max_rows,
        )  # fmt: skip

    def connect(self, options: EngineConfig, device: torch.device) -> Mesh:
        """Join the world, once, and form the plan's groups."""
        setup = self.setup
        if not torch.distributed.is_initialized():
            meshes.join(setup.host, setup.port, setup.rank, setup.size, device, setup.timeout)
        self.mesh = Mesh.connect(options.parallel, setup.rank, setup.timeout)
        self.mesh.machine_size = setup.machine_size
        self.mesh.traffic.beats = self._beats
        return self.mesh

    def step(self, wire: WireParts) -> Any:
        """Compute one step, of which each data rank has a part; all ranks do so at once, also those with no rows.

        An error on purpose ends the rank as any other does: those that go on with the step wait for it in a collective,
        and would take what it begins in the next step for its part of this one.
        """
        assert self.mesh is not None
        try:
            with self.mesh.pipeline.step():
                return self._step(wire, self.mesh)
        except FlexMoEError as error:
            raise RuntimeError(str(error)) from error

    def _step(self, wire: WireParts, mesh: Mesh) -> Any:
        assert self.runner is not None
        own = wire.parts[mesh.place.dp]
        flight = self.runner.launch_rows(*unpack(own), own.sources, wire.together)
        if self.setup.rank not in mesh.layout.samplers:
            return SILENT
        if isinstance(flight, GraphFlight) and not flight.needs_host:
            return Later(flight.landed, flight.wait)
        return flight.wait()

    def loads(self, model: str) -> list[LayerLoad]:
        """The counts of this rank's rows and layers, which its whole tensor group has: its first rank tells them."""
        assert self.runner is not None
        assert self.mesh is not None
        if self.mesh.place.tp > 0:
            return []
        layers = self.mesh.shard(self.runner.model.config).layers
        return [load for load in self.runner.expert_loads(model) if load.layer in layers]

    def stop(self) -> None:
        """Let go of the model."""
        self.runner = None
        take_in()  # graphs first: NCCL does not let go of a group while one is there that uses it
        if self.mesh is not None:
            self.mesh.close()
            self.mesh = None

    def close(self) -> None:
        """Leave the world."""
        self.stop()
        meshes.leave()

    def _on_own_device(self, options: EngineConfig) -> EngineConfig:
        """On GPUs each rank of a machine takes one of its own."""
        if choose_device(options.device.device).type != "cuda":
            return options
        device = f"cuda:{self.setup.local_rank}"
        torch.cuda.set_device(device)
        return replace(options, device=replace(options.device, device=device))


class ChildWorker(Worker):
    """A worker whose process is there for nothing else: under torchrun it may be the user's."""

    def start(self, options: EngineConfig) -> RankReport:
        report = super().start(options)
        leave_out()
        return report


def run() -> None:
    """The life of a child process; see parallel/launch.py."""
    main(ChildWorker, sys.argv[1:])
