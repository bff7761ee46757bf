"""Interleaved rounds: in each, every engine answers the same prompts, one after another, and the order rotates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.pool import Worker, cpu_seconds
from harness.setups import REFERENCE, Load, Setup

Workers = Mapping[tuple[str, str, str], Worker]
Prompts = list[list[int]]

# Calls in a turn: the caches are cold after the others' turns, and compiled code must first see its shapes.
_FIRST_WARMUP, _WARMUP, _REPEATS = 3, 1, 3


@dataclass
class Tally:
    """samples: the median of each turn, in ms. equal: answers like the reference's. idle: CPU seconds of the others."""

    samples: list[float] = field(default_factory=list)
    equal: int = 0
    idle: float = 0.0


def play(load: Load, setups: Sequence[Setup], workers: Workers, rounds: Sequence[Prompts]) -> dict[Setup, Tally]:
    """rounds: the prompts of each. The first one only warms up."""
    tallies = {setup: Tally() for setup in setups}
    for number, asked in enumerate(rounds):
        reference = workers[REFERENCE.worker_key].run(asked, load.new, REFERENCE.variant, warmup=0, repeats=1)
        first = number % len(setups)
        for setup in [*setups[first:], *setups[:first]]:
            tally = tallies[setup] if number else Tally()
            _turn(load, setup, workers, asked, tally, _WARMUP if number else _FIRST_WARMUP, reference["calls"][0])
    return tallies


def _turn(
    load: Load, setup: Setup, workers: Workers, asked: Prompts, tally: Tally, warmup: int, reference: dict[str, Any]
) -> None:
    others = [worker for key, worker in workers.items() if key != setup.worker_key]
    before = cpu_seconds(others)
    calls = workers[setup.worker_key].run(asked, load.new, setup.variant, warmup=warmup, repeats=_REPEATS)["calls"]
    tally.idle += cpu_seconds(others) - before
    tally.samples.append(sorted(load.value(call) for call in calls)[_REPEATS // 2])
    tally.equal += sum(got == want for got, want in zip(calls[0]["tokens"], reference["tokens"], strict=True))
