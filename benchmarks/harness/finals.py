"""Interleaved rounds: in each, every engine answers the same prompts, one after another, and the order rotates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from harness.pool import Worker, cpu_seconds
from harness.setups import REFERENCE, Load, Setup

Workers = Mapping[tuple[str, str, str], Worker]
Prompts = list[list[int]]


@dataclass(frozen=True)
class Pace:
    """Calls in a turn: caches are cold after the others' turns, and compiled code must first see its shapes."""

    first_warmup: int = 3
    warmup: int = 1
    repeats: int = 3


@dataclass
class Tally:
    """samples: the median of each turn, in ms. equal: answers like the reference's. idle: CPU seconds of the others.

    reads: of each turn, bytes a second of a plain stream just before and just after it, on average.
    """

    samples: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    equal: int = 0
    idle: float = 0.0


def play(
    load: Load,
    setups: Sequence[Setup],
    workers: Workers,
    rounds: Iterable[Prompts],
    reference: Setup | None = REFERENCE,
    pace: Pace = Pace(),
    stream: Callable[[], float] | None = None,
) -> dict[Setup, Tally]:
    """rounds: the prompts of each. The first one only warms up. reference: whose answers to compare with, if any.

    stream: measures how fast memory is read at this moment, before and after each turn.
    """
    tallies = {setup: Tally() for setup in setups}
    for number, asked in enumerate(rounds):
        expected: Prompts = [[]] * len(asked)
        if reference is not None:
            told = workers[reference.worker_key].run(asked, load.new, reference.variant, warmup=0, repeats=1)
            expected = told["calls"][0]["tokens"]
        first = number % len(setups)
        before = stream() if stream else 0.0
        for setup in [*setups[first:], *setups[:first]]:
            tally = tallies[setup] if number else Tally()
            warmup = pace.warmup if number else pace.first_warmup
            _turn(load, setup, workers, asked, tally, warmup, pace.repeats, expected)
            if stream:
                after = stream()
                tally.reads.append((before + after) / 2)
                before = after
    return tallies


def _turn(
    load: Load,
    setup: Setup,
    workers: Workers,
    asked: Prompts,
    tally: Tally,
    warmup: int,
    repeats: int,
    expected: Prompts,
) -> None:
    others = [worker for key, worker in workers.items() if key != setup.worker_key]
    before = cpu_seconds(others)
    calls = workers[setup.worker_key].run(asked, load.new, setup.variant, warmup=warmup, repeats=repeats)["calls"]
    tally.idle += cpu_seconds(others) - before
    tally.samples.append(sorted(load.value(call) for call in calls)[repeats // 2])
    tally.equal += sum(got == want for got, want in zip(calls[0]["tokens"], expected, strict=True))
