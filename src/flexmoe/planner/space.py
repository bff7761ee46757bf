"""space: every way to spread a model over GPUs. Enters: a model, a number of GPUs. Leaves: candidates, in order.

GPUs = replicas x pipeline x data x tensor, and whole experts over any divisor of data x tensor. Replicas are engines of
their own, which share nothing but the requests that a router gives them; the other degrees are a plan's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import check
from flexmoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan, and how many engines run it. idle: GPUs that are left over."""

    plan: ParallelPlan
    replicas: int = 1
    idle: int = 0

    @property
    def name(self) -> str:
        """For people: `2 engines x tensor 4, experts over 4, all-to-all`."""
        plan = self.plan
        sizes = {
            "pipeline": plan.pipeline_parallel_size, "data": plan.data_parallel_size,
            "tensor": plan.tensor_parallel_size,
        }  # fmt: skip
        words = [f"{name} {size}" for name, size in sizes.items() if size > 1] or ["one rank"]
        engines = f"{self.replicas} engines x " if self.replicas > 1 else ""
        idle = f" ({self.idle} idle)" if self.idle else ""
        if plan.stage_size == 1:
            return engines + " ".join(words) + idle
        experts = f"experts over {plan.expert_parallel_size}" if plan.expert_parallel_size > 1 else "experts sliced"
        if 1 < plan.expert_parallel_size < plan.stage_size:
            experts += f" and sliced {plan.expert_tensor_size} ways"
        return f"{engines}{' '.join(words)}, {experts}{', all-to-all' if plan.uses_all_to_all else ''}{idle}"

    @property
    def order(self) -> tuple[int, ...]:
        """Candidates are looked at in this order: the simplest first."""
        p = self.plan
        sizes = (p.pipeline_parallel_size, p.num_ranks, p.data_parallel_size, p.expert_parallel_size)
        return (*sizes, int(p.uses_all_to_all))


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Which candidates are wanted.

    gpus: to use. node: GPUs that a tensor group may have at most, which are those of one node: each layer waits for it
    twice. one_engine: no replicas, for one engine is to be started; it may leave GPUs idle. shared: the ranks share one
    device, so that fewer of them leave none idle. only_data_parallel: neither slices of layers nor stages, on all GPUs;
    data ranks still share the experts.
    """

    gpus: int
    node: int
    shared: bool = False
    one_engine: bool = False
    only_data_parallel: bool = False


def candidates(model: ModelConfig, space: Space) -> list[Candidate]:
    """All plans that fit the model's shape, the simplest first. Whether they fit in memory is not asked here."""
    found = []
    for candidate in _all(model, space):
        try:
            check(candidate.plan, model)
        except ConfigError:
            continue
        found.append(candidate)
    return sorted(found, key=lambda candidate: candidate.order)


def _all(model: ModelConfig, space: Space) -> Iterator[Candidate]:
    for ranks in _divisors(space.gpus):
        if space.only_data_parallel and space.one_engine and ranks != space.gpus:
            continue
        alone = space.one_engine or space.shared
        replicas, idle = (1, 0 if space.shared else space.gpus - ranks) if alone else (space.gpus // ranks, 0)
        for pipeline, stage in _pairs(ranks):
            for data, tensor in _pairs(stage):
                if tensor > space.node or (space.only_data_parallel and pipeline * tensor > 1):
                    continue
                for plan in _plans(model, pipeline, data, tensor):
                    yield Candidate(plan, replicas, idle)


def _plans(model: ModelConfig, pipeline: int, data: int, tensor: int) -> Iterator[ParallelPlan]:
    """How experts share a stage: sliced, spread or both; and, where they are spread, what travels."""
    stage = data * tensor
    for experts in _divisors(stage) if model.moe is not None else [1]:
        for dispatch in ("auto", "all_to_all") if experts > 1 else ("auto",):
            yield ParallelPlan(tensor, experts, pipeline, data, dispatch)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _pairs(number: int) -> Iterator[tuple[int, int]]:
    return ((n, number // n) for n in _divisors(number))
