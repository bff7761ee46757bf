"""An engine whose model is spread over ranks. Enters: options. Leaves: what Engine needs to run it like one in-process.

The driver (this process) keeps scheduler, sampling states and detokenizers. It sends each step as plain data to all
ranks; those that have the logits answer with the tokens. On GPUs every rank of a plan without stages and all-to-all
knows those of its rows on its device, so that the next step can be sent before the driver knows them. Why the driver is
no rank itself stands in parallel/supervisor.py.
"""

from __future__ import annotations

import functools
import itertools
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexmoe.config.engine import EngineConfig
from flexmoe.config.layout import RankLayout
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.routing import LayerLoad
from flexmoe.config.shard import check
from flexmoe.engine import launchers
from flexmoe.engine.device import choose_dtype, tell_of_slow_dtype
from flexmoe.engine.launchers import Launcher
from flexmoe.engine.model_runner import Flight, decodes_only
from flexmoe.engine.sampler import SampleOutput, SamplingState
from flexmoe.engine.startup import load_tokenizer, with_quantization
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.engine.wire import pack_parts
from flexmoe.engine.worker import RankReport
from flexmoe.models.hub import ModelSource, open_model
from flexmoe.parallel.supervisor import Supervisor
from flexmoe.scheduling.data_ranks import parts_of
from flexmoe.scheduling.step import Step

_MODULE = "flexmoe.engine.worker"  # whose run() is the program of a child


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes of the KV caches of all ranks."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class StartedRanks:
    """What the engine runs with; the fields of `startup.Started` that do not need the model."""

    source: ModelSource
    cache: CacheSize
    num_blocks: int
    tokenizer: Tokenizer | None
    device: torch.device
    dtype: torch.dtype
    threads: int
    backend: str
    decode_kernels: str
    prompt_kernels: str
    max_model_len: int
    quantization: None = None  # ranks hold full weights

    @property
    def config(self) -> ModelConfig:
        return self.source.config


@dataclass(frozen=True, slots=True)
class _RemoteFlight:
    """A step that the ranks compute."""

    ranks: Supervisor
    number: int
    samplers: Sequence[int]
    step: Step

    def wait(self) -> SampleOutput:
        """The tokens of all data ranks, one after the other."""
        answers = self.ranks.wait(self.number)
        found: list[SampleOutput] = [answers[rank] for rank in self.samplers]
        return functools.reduce(SampleOutput.plus, found)


class RankedRunner:
    """A ModelRunner's interface on top of the ranks."""

    mixes_ahead = False  # see ModelRunner

    def __init__(
        self, ranks: Supervisor, plan: ParallelPlan, device: torch.device, max_ahead: int, *, keep: bool
    ) -> None:
        """max_ahead: decodes of a step that may be launched ahead.

        keep: leave the processes to whoever made them; close() only unloads the model.
        """
        self.ranks, self.device, self._max_ahead, self._keep = ranks, device, max_ahead, keep
        self._samplers = RankLayout(plan).samplers
        self._end = weakref.finalize(self, _nothing if keep else ranks.kill)  # also when the interpreter ends

    def can_run_ahead(self, step: Step, states: Sequence[SamplingState]) -> bool:
        """Whether the ranks can take the step behind this one before this one's tokens are known; see ModelRunner."""
        ready = all(state.device_ready and not state.wants_routing for state in states)
        busy = [part for part in parts_of(step) if part.chunks]
        return ready and bool(busy) and all(decodes_only(part, self._max_ahead) for part in busy)

    def launch(self, step: Step, states: Sequence[SamplingState], *, after: Flight | None = None) -> Flight:
        """Send a step to all ranks. after: as ModelRunner has it. Raises RankError if a rank has failed."""
        assert after is None or isinstance(after, _RemoteFlight)
        payload = pack_parts(step, states, None if after is None else after.step)
        number = self.ranks.post("step", payload, "computing a step", owed=self._samplers)
        if step.num_decodes < len(step.chunks):
            # The engine has more to do before it waits: see Scheduler.expect. The thread that sends would get the
            # interpreter only then: measured, a rank has a command after 510 us behind 300 us of work, so after 190.
            time.sleep(0)
        return _RemoteFlight(self.ranks, number, self._samplers, step)

    def run(self, step: Step, states: Sequence[SamplingState]) -> SampleOutput:
        """Send a step and wait for its tokens."""
        return self.launch(step, states).wait()

    def traffic(self) -> list[dict[str, float]]:
        """Bytes that each rank sent since the last call, by label."""
        found = self._ask("traffic", None, "counting bytes")
        return [found[rank] for rank in sorted(found)]

    def count_experts(self, on: bool) -> None:
        """Let all ranks count which experts tokens choose, or no more."""
        self._ask("count", on, "recording the routing")

    def expert_loads(self, model: str) -> list[LayerLoad]:
        """What all ranks counted since `count_experts`, together."""
        answers = self._ask("loads", model, "telling the routing")
        found: dict[int, LayerLoad] = {}
        for load in itertools.chain.from_iterable(answers.values()):
            found[load.layer] = found[load.layer].plus(load) if load.layer in found else load
        return [found[layer] for layer in sorted(found)]

    def close(self) -> None:
        """Unload the model and end the processes. Raises RankError if one dies or hangs over it."""
        if self._keep:
            self._ask("stop", None, "closing")
        else:
            self.ranks.close()
        self._end.detach()  # not before: Ctrl-C may have come between

    def _ask(self, command: str, payload: Any, doing: str) -> dict[int, Any]:
        """What every rank answers. A step that was sent before is still to be waited for."""
        everyone = range(len(self.ranks.members))
        return self.ranks.wait(self.ranks.post(command, payload, doing, owed=everyone), forget=False)


def start_ranks(options: EngineConfig, ranks: Supervisor | None = None) -> tuple[StartedRanks, RankedRunner]:
    """Start the processes and the model in them. What cannot fit is refused before any is started.

    ranks: processes that run already, as many as the plan has ranks; they outlive the engine.

    Under torchrun this returns on the first process only: the others serve as ranks, and exit.
    """
    plan = options.parallel
    source = open_model(options.load)
    check(plan, source.config)
    with_quantization(options, source)
    launcher = launchers.choose(options.launch.launcher)
    device = launcher.device(options.device.device, plan.num_ranks)
    options, dtype = _decided(options, source, device, launcher.threads(device, plan.num_ranks))
    tokenizer = load_tokenizer(options, source)
    keep = ranks is not None
    ranks = ranks or launch_ranks(options, launcher)
    try:
        everyone = range(plan.num_ranks)
        number = ranks.post("start", options, "loading the model", owed=everyone, patient=True)
        reports: dict[int, RankReport] = ranks.wait(number)
    except BaseException:
        if not keep:
            ranks.kill()
        raise
    first = reports[0]
    size = CacheSize(sum(report.cache_bytes for report in reports.values()))
    return StartedRanks(
        source, size, first.num_blocks, tokenizer, device, dtype, first.threads, first.backend, first.decode_kernels,
        first.prompt_kernels, first.max_model_len,
    ), RankedRunner(ranks, plan, device, first.max_ahead, keep=keep)  # fmt: skip


def launch_ranks(options: EngineConfig, launcher: Launcher) -> Supervisor:
    """The processes of a plan, nothing loaded yet."""
    timeout = options.launch.worker_timeout
    patience = 1.5 * timeout + 10  # of collectives: the supervisor, which knows who hangs, comes first
    return Supervisor(launcher.start(_MODULE, options, patience), timeout, RankLayout(options.parallel).describe)


def _decided(
    options: EngineConfig, source: ModelSource, device: torch.device, threads: int
) -> tuple[EngineConfig, torch.dtype]:
    """The options with everything decided that ranks might decide differently: files, number format, threads."""
    dtype = choose_dtype(options.device.dtype, source.config, device, few_rows_in_c=False)
    tell_of_slow_dtype(options.device.dtype, device)
    threads = options.device.threads or threads
    own = replace(options.device, dtype=str(dtype).removeprefix("torch."), threads=threads, device=device.type)
    builtin = options.load.model is None  # which each machine has where it is installed
    model = None if builtin else source.name if source.folder is None else str(source.folder.absolute())
    load = replace(options.load, model=model, revision=None, force_download=False, progress=False)
    return replace(options, device=own, load=load), dtype


def _nothing() -> None:
    """For a runner that leaves its processes to others."""
