"""search: the best plan for a model, a machine and a workload. Enters: these. Leaves: candidates, ranked, with reasons.

Exhaustive: an engine has few degrees, and the candidates for 1,024 GPUs are some thousand. What a layer may choose for
itself, its replicas of hot experts, is found by dynamic programming (placement.py). The order never depends on chance:
equal candidates are ranked by how simple they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.model import ModelConfig
from flexmoe.errors import ConfigError
from flexmoe.planner.estimate import Estimate, Promise, Terms, estimate
from flexmoe.planner.space import Candidate, Space, candidates
from flexmoe.planner.steps import Steps
from flexmoe.planner.workload import Demand

Objective = Literal["ttft", "tpot", "throughput"]
Prepare = Callable[[Candidate], tuple[Candidate, Steps]]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "tpot", "ttft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked. budget: candidates to cost at most, None for all; those that do not fit in memory cost nothing."""

    space: Space
    demand: Demand
    promise: Promise
    objective: Objective = "throughput"
    limits: SchedulerConfig = SchedulerConfig()  # noqa: RUF009 - frozen
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    """An estimate and why it did not win; "" for the winner."""

    estimate: Estimate
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """The best first, then those that break a promise, at last those that cannot run. skipped: beyond the budget."""

    ranking: tuple[Ranked, ...]
    objective: Objective
    skipped: int

    @property
    def best(self) -> Estimate:
        return self.ranking[0].estimate


def search(model: ModelConfig, question: Question, prepare: Prepare) -> Found:
    """Cost every candidate and rank them. prepare: places a candidate's experts, and tells its step times.

    Raises ConfigError, with the nearest miss, if none can run.
    """
    wanted = candidates(model, question.space)
    if not wanted:
        raise ConfigError(
            f"no plan spreads {model.architecture} over {question.space.gpus} GPUs; use a number that its heads, its "
            "layers or its experts can share."
        )
    estimates: list[Estimate] = []
    costed = 0
    for candidate in wanted:
        if question.budget is not None and costed >= question.budget:
            break
        found = estimate(*prepare(candidate), question.demand, question.promise, question.limits)
        costed += not found.refused
        estimates.append(found)
    return Found(_rank(estimates, question.objective), question.objective, len(wanted) - len(estimates))


def value(found: Estimate, objective: Objective) -> float:
    """What is to be small, in seconds; of the throughput what a token takes."""
    return {"ttft": found.ttft, "tpot": found.tpot, "throughput": sum(found.work.values())}[objective]


def terms(found: Estimate, objective: Objective) -> Terms:
    """What `value` is the sum of."""
    return {"ttft": found.first, "tpot": found.token, "throughput": found.work}[objective]


def shortfall(found: Estimate, objective: Objective) -> str:
    """What is not kept of what was asked, "" if nothing. Throughput asks for no rate, but for the most."""
    if objective == "throughput":
        return found.missed if found.hopeless else ""
    return found.missed


def _rank(estimates: Iterable[Estimate], objective: Objective) -> tuple[Ranked, ...]:
    def key(found: Estimate) -> tuple[bool, bool, float, tuple[int, ...]]:
        # Nine digits: what differs by rounding alone is decided by simplicity.
        return (
            bool(found.refused),
            bool(shortfall(found, objective)),
            float(f"{value(found, objective):.9g}"),
            found.candidate.order,
        )

    ordered = sorted(estimates, key=key)
    best = ordered[0]
    if best.refused:
        raise ConfigError(f"no plan fits; the nearest is {_nearest(ordered)}")
    return tuple(Ranked(found, "" if found is best else _reason(found, best, objective)) for found in ordered)


def _nearest(refused: Sequence[Estimate]) -> str:
    """The candidate that spreads the model furthest, and what it lacks."""
    widest = max(refused, key=lambda found: (found.candidate.plan.num_ranks, found.candidate.order))
    return f"{widest.candidate.name}: {widest.refused}"


def _reason(found: Estimate, best: Estimate, objective: Objective) -> str:
    """Why a candidate lost: it cannot run, it breaks a promise, or the term that it loses most by."""
    missed = shortfall(found, objective)
    if found.refused or (missed and not shortfall(best, objective)):
        return found.refused or missed
    own, others = terms(found, objective), terms(best, objective)
    losses = {name: own.get(name, 0.0) - others.get(name, 0.0) for name in sorted({*own, *others})}
    worst = max(losses, key=lambda name: losses[name])
    if losses[worst] <= 0:
        return "the same, and less simple"
    return f"{worst} {_span(own.get(worst, 0.0))}, the best {_span(others.get(worst, 0.0))}"


def _span(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 or not seconds else f"{seconds * 1e6:.3g} µs"
