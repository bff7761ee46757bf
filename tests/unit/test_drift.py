"""engine/drift.py: the ratio, its bound, and the term that explains it."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping

import pytest

from flexmoe.engine.drift import Drift
from flexmoe.scheduling.step import Step

STEP = Step([], 0, [])


class Machine:
    """Predicts steps of changing make-up, and takes `factors` times each term."""

    def __init__(self, **factors: float) -> None:
        self.factors, self._draw = factors, random.Random(0)
        self.terms: Mapping[str, float] = {}

    def predict(self, step: Step) -> Mapping[str, float]:
        return self.terms

    def run(self, drift: Drift, steps: int, start: float = 0.0) -> float:
        now = start
        for _ in range(steps):
            self.terms = {name: self._draw.uniform(0.001, 0.01) for name in ("attention", "experts", "host")}
            took = sum(seconds * self.factors.get(name, 1.0) for name, seconds in self.terms.items())
            drift.add(STEP, now, now + took)
            now += took
        return now


def test_a_machine_as_predicted_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    drift = Drift(machine.predict)
    machine.run(drift, 400)
    assert drift.ratio == pytest.approx(1)
    assert drift.predicted == pytest.approx(drift.measured)
    assert drift.drifted is None
    assert not caplog.records


@pytest.mark.parametrize(("term", "factor"), [("experts", 4.0), ("attention", 5.0), ("host", 6.0)])
def test_the_term_that_drifted_is_named_once(caplog: pytest.LogCaptureFixture, term: str, factor: float) -> None:
    machine = Machine(**{term: factor})
    drift = Drift(machine.predict)
    with caplog.at_level(logging.WARNING):
        machine.run(drift, 600)
    assert drift.ratio > 1.5
    assert drift.drifted == term
    (record,) = caplog.records
    assert f"is {term}, {factor:.2f} times its prediction" in record.getMessage()


def test_once_back_it_is_told_anew(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(experts=4.0)
    drift = Drift(machine.predict)
    now = machine.run(drift, 200)
    machine.factors = {}
    now = machine.run(drift, 300, now)
    assert drift.drifted is None
    machine.factors = {"host": 9.0}
    machine.run(drift, 300, now)
    assert len(caplog.records) == 2


def test_a_step_sent_ahead_begins_when_the_one_before_ends() -> None:
    machine = Machine()
    machine.terms = {"experts": 1.0}
    drift = Drift(machine.predict)
    drift.add(STEP, 0.0, 1.0)
    drift.add(STEP, 0.1, 2.0)
    assert drift.measured == 2.0
    assert drift.ratio == 1.0


def test_nothing_is_said_of_the_first_steps(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(experts=50.0)
    machine.run(Drift(machine.predict), 100)
    assert not caplog.records
