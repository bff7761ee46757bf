"""planning: a model on a machine, ready to be asked. Enters: names, files. Leaves: searches, simulations, step times.

What `flexmoe plan`, `flexmoe simulate`, `LLM(plan="auto")` and FlexFlow's search keys have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from flexmoe.config.engine import CLEARLY_FASTER, LoadConfig, SchedulerConfig
from flexmoe.config.machine import Machine, shipped_machines
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.routing import LayerLoad, read_recording
from flexmoe.config.server import usual_chunk_rate
from flexmoe.config.shard import Shard, check
from flexmoe.errors import ConfigError
from flexmoe.models.hub import open_model
from flexmoe.planner.cost_model import CostModel
from flexmoe.planner.estimate import Promise
from flexmoe.planner.figures import EXTRAPOLATED, PREDICTED, Point, point
from flexmoe.planner.placement import MOST_SPARE, place
from flexmoe.planner.replica import EngineLimits
from flexmoe.planner.routing import Routing, expert_loads
from flexmoe.planner.search import Found, Question, search
from flexmoe.planner.simulator import Fleet, simulate
from flexmoe.planner.space import Candidate, Space
from flexmoe.planner.steps import Steps
from flexmoe.planner.workload import Workload
from flexmoe.scheduling.roofline import StepTokens, step_tokens

BLOCK = 16  # tokens of a KV block, the engine's default
_ROWS = 512  # of the step whose imbalance is told


@dataclass(frozen=True)
class Setting:
    """A model on a machine. name: of the model, for people. loads: how often its experts were chosen, if recorded."""

    name: str
    model: ModelConfig
    machine: Machine
    dtype: str
    quantization: str | None = None
    loads: tuple[LayerLoad, ...] = ()

    @classmethod
    def open(
        cls, model: str | None, machine: str, *, dtype: str = "auto", quantization: str | None = None,
        routing: str | None = None,
    ) -> Setting:  # fmt: skip
        """Raises ConfigError or CheckpointError where there is no such model, machine or recording."""
        source = open_model(LoadConfig(model=model, load_format="dummy"))
        loads = tuple(read_recording(routing)) if routing else ()
        return cls.of(source.name, source.config, Machine.load(machine), dtype, quantization, loads)

    @classmethod
    def of(
        cls, name: str, model: ModelConfig, machine: Machine, dtype: str = "auto", quantization: str | None = None,
        loads: tuple[LayerLoad, ...] = (),
    ) -> Setting:  # fmt: skip
        """dtype "auto": what the engine takes by itself."""
        found = _usual_dtype(model, machine, quantization) if dtype == "auto" else dtype
        return cls(name, model, machine, found, quantization, loads)

    def resized(self, gpus: int | None) -> Setting:
        """On so many devices; None: on the machine's. Raises ConfigError if nothing is known of a link among them."""
        if gpus is None:
            return self
        machine = self.machine.resized(gpus)
        reach = machine.reach(gpus)
        if reach < gpus:
            named = [f"the machine {name}" for name in _like(machine, gpus)]
            raise ConfigError(
                f"{gpus} devices of {self.machine.name} are {machine.nodes} nodes, but its links reach {reach}; "
                f"use {', '.join(['fewer', *named])}, or a machine file with a link between nodes."
            )
        return replace(self, machine=machine)

    @cached_property
    def routing(self) -> Routing | None:
        """None where nothing was recorded: all experts are as likely."""
        return Routing.recorded(self.loads) if self.loads else None

    @cached_property
    def step_tokens(self) -> StepTokens:
        """Of a step, what pays by the roofline: what the engine takes by itself."""
        device = self.machine.device
        return step_tokens(self.model, 4 if self.dtype == "float32" else 2, device.kind, device.name)

    def space(self, *, one_engine: bool = False, only_data_parallel: bool = False) -> Space:
        """All ways to use the machine's devices."""
        machine = self.machine
        return Space(
            gpus=machine.num_devices,
            node=machine.devices_per_node,
            shared=machine.is_shared,
            one_engine=one_engine,
            only_data_parallel=only_data_parallel,
        )

    def steps(self, plan: ParallelPlan, limits: SchedulerConfig, *, one_pass: bool = False) -> Steps:
        """Step times of a plan, with so many tokens in a step at most: by default as many as the engine would take.

        one_pass: see CostModel.
        """
        sizes = self.step_tokens.asked(limits.max_num_batched_tokens)
        cost = CostModel(
            self.machine, self.model, plan, dtype=self.dtype, quantization=self.quantization, routing=self.routing,
            one_pass=one_pass,
        )  # fmt: skip
        return Steps(cost, sizes.most, sizes.widest)

    def search(self, question: Question) -> Found:
        """See search.py. Where routing was recorded, plans that spread experts place them by it."""
        return search(self.model, question, lambda candidate: self._placed(candidate, question.limits))

    def candidate(self, plan: str, workload: Workload, limits: SchedulerConfig) -> Candidate:
        """The plan of a file, as often as the devices allow; of "auto" the best. Raises ConfigError if it misfits."""
        gpus = self.machine.num_devices
        if plan == "auto":
            promise = Promise.from_ms(workload.slo_ttft_ms, workload.slo_tpot_ms)
            asked = Question(space=self.space(), demand=workload.demand(), promise=promise, limits=limits)
            return self.search(asked).best.candidate
        read = ParallelPlan.read(plan)
        check(read, self.model)
        if gpus % read.num_ranks:
            raise ConfigError(
                f"the plan {plan} needs {read.num_ranks} devices, of which {gpus} are no multiple; use another number."
            )
        return Candidate(read, gpus // read.num_ranks)

    def simulate(
        self, candidate: Candidate, workload: Workload, limits: SchedulerConfig, *, exact_tokens: int,
        measured_gpus: int = 0,
    ) -> Point:  # fmt: skip
        """Serve the workload. exact_tokens: output tokens to simulate at most; of more, some replicas with their share.

        Raises ConfigError if the plan does not fit into memory.
        """
        steps = self.steps(candidate.plan, limits)
        refused = steps.refusal(BLOCK)
        if refused:
            raise ConfigError(f"{candidate.name} cannot run: {refused}")
        demand = workload.demand()
        expected = demand.requests * demand.mean_output
        simulated = max(1, min(candidate.replicas, int(candidate.replicas * exact_tokens / expected)))
        asked = workload.share(simulated / candidate.replicas)
        requests = asked.requests()
        engine = EngineLimits(
            scheduler=limits,
            num_blocks=max(1, steps.kv_tokens // BLOCK),
            block_size=BLOCK,
            data_ranks=candidate.plan.data_parallel_size,
            prefix_caching=any(request.blocks for request in requests),
            tokens=self.step_tokens,
            ahead=steps.ahead,
            serving=self.machine.serving,
            chunk_rate=usual_chunk_rate(self.machine.device.kind),
            beside=not self.machine.is_shared,
        )
        fleet = Fleet(engine, steps.seconds, candidate.plan.num_ranks, candidate.replicas, simulated)
        done = simulate(fleet, requests)
        # Only now it is known which steps there were.
        kind = PREDICTED if not steps.extrapolated and fleet.gpus <= measured_gpus else EXTRAPOLATED
        slo = workload.slo_ttft_ms, workload.slo_tpot_ms
        return replace(point(fleet, done, kind, self._imbalance(candidate.plan), slo), plan=candidate.name)

    def _placed(self, candidate: Candidate, limits: SchedulerConfig) -> tuple[Candidate, Steps]:
        """The candidate with its experts placed by the recorded load, replicas included where memory is left."""
        plan = candidate.plan
        steps = self.steps(plan, limits)
        if not self.loads or plan.expert_parallel_size == 1 or steps.refusal(BLOCK):
            return candidate, steps
        stages = self._stages(plan)
        placements = {}
        for loads in stages:
            room = min(steps.spare_experts, MOST_SPARE * len(loads))
            placements.update(place(loads, plan.expert_parallel_size, room))
        placed = replace(candidate, plan=replace(plan, placements=placements))
        return placed, self.steps(placed.plan, limits)

    def _imbalance(self, plan: ParallelPlan) -> float:
        """Of a full step's rows: what the busiest rank has to do over the mean, averaged over the MoE layers."""
        moe = self.model.moe
        if moe is None or plan.expert_parallel_size == 1:
            return 1.0
        placed = {plan.placement(moe.num_experts, i) for i, layer in enumerate(self.model.layers) if layer.is_moe}
        loads = [expert_loads(moe, placement, self.routing or Routing()).load(_ROWS) for placement in placed]
        return fmean(load.pairs for load in loads) * plan.expert_parallel_size / (_ROWS * moe.top_k)

    def _stages(self, plan: ParallelPlan) -> Sequence[Sequence[LayerLoad]]:
        """The recorded loads of each pipeline stage's layers."""
        stages = [Shard(plan, self.model, rank).layers for rank in range(0, plan.num_ranks, plan.stage_size)]
        return [[load for load in self.loads if load.layer in layers] for layers in stages]


def _usual_dtype(model: ModelConfig, machine: Machine, quantization: str | None) -> str:
    """By the machine's file, what `engine.device.choose_dtype` finds by trying. Few rows go through the C kernels, and
    with quantized weights all do.
    """
    own, device = model.checkpoint_dtype, machine.device
    if device.kind != "cpu" or own == "float32":
        return own
    is_slow = not quantization and device.flops("float32") > CLEARLY_FASTER * device.flops(own)
    return "float32" if is_slow or own == "float16" else own


def _like(machine: Machine, devices: int) -> list[str]:
    """Machines that come with the package and have so many of the same devices, linked."""
    shipped = {name: Machine.load(name) for name in shipped_machines()}
    alike = {name: one for name, one in shipped.items() if one.device.name == machine.device.name}
    return [name for name, one in alike.items() if min(one.num_devices, one.reach(devices)) >= devices]
