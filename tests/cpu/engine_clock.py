"""A clock for benchmarks of engines that goes on only while one generates, by a set time for each token: a busy machine
changes no figure. Enters: pytest's MonkeyPatch. Leaves: the clock, in place of that of `flexmoe.bench.latency`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flexmoe.bench import latency
from flexmoe.bench.engines import FlexMoE, Prompts, TimedEngine
from flexmoe.bench.hugging_face import HuggingFace


class EngineClock:
    """Stands in for the module `time`. An engine that generates `count` tokens takes `seconds(count)`; of ours a step
    alone `step` seconds, or what another token takes more.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.seconds: Callable[[int], float] = lambda count: 0.001 * count
        self.step: float | None = None
        for engine in (FlexMoE, HuggingFace):
            monkeypatch.setattr(engine, "generate", self._timed(engine.generate))
        monkeypatch.setattr(FlexMoE, "step_seconds", self._stepping(FlexMoE.step_seconds))
        monkeypatch.setattr(latency, "time", self)
        monkeypatch.setattr(latency, "read_bandwidth", lambda _device: 10e9)  # measured, it would take a second

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def _stepping(self, step_seconds: Callable[..., list[float]]) -> Callable[..., list[float]]:
        def stepping(engine: FlexMoE, prompts: Prompts, count: int) -> list[float]:
            steps = step_seconds(engine, prompts, count)
            return [self.seconds(2) - self.seconds(1) if self.step is None else self.step for _ in steps]

        return stepping

    def _timed(self, generate: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
        def timed(engine: TimedEngine, prompts: Prompts, count: int) -> list[list[int]]:
            self.now += self.seconds(count)
            return generate(engine, prompts, count)

        return timed
