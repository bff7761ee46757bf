"""planner/figures.py and report/simulation.py: a simulation in numbers, measured rows beside, and their curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexmoe.errors import ConfigError
from flexmoe.planner.figures import EXTRAPOLATED, MEASURED, Point, measured_points, point
from flexmoe.planner.replica import Served
from flexmoe.planner.simulator import Fleet, Simulated, TimeLine
from tests.unit.test_simulator import limits, seconds

ROW: dict[str, Any] = {
    "params": {"rate": 2.0},
    "result": {
        "ttft_ms": {"mean": 50.0, "p50": 40.0, "p99": 90.0}, "tpot_ms": {"mean": 9.0, "p50": 8.0, "p99": 12.0},
        "output_tokens_per_s": 250.0, "requests_per_s": 1.9,
    },
}  # fmt: skip


def simulated() -> Point:
    """Two requests of ten tokens in ten seconds, on one replica of four."""
    served = [
        Served(0.0, 100, 10, first=0.1, end=1.0),
        Served(10.0, 100, 10, cut=3, first=10.3, end=12.1),
    ]
    fleet = Fleet(limits(), seconds, gpus_each=2, replicas=4, simulated=1)
    done = Simulated(served, TimeLine(1.0), end=12.5, busy=0.2, steps=20, preemptions=1)
    return point(fleet, done, EXTRAPOLATED, 1.25, (200.0, None))


def test_figures_are_of_all_replicas() -> None:
    found = simulated()
    assert (found.gpus, found.replicas, found.simulated) == (8, 4, 1)
    assert found.rate == pytest.approx(4 * 2 / 10)
    assert found.output_tokens_per_s == pytest.approx(4 * 20 / 12.5)
    assert found.ttft_ms["mean"] == pytest.approx(200)
    assert found.tpot_ms["p50"] == pytest.approx(150)
    assert found.within_slo == 0.5
    assert found.cut_tokens == 3
    assert found.imbalance == 1.25


def test_measured_rows_become_points() -> None:
    (found,) = measured_points([ROW], 2)
    assert (found.kind, found.gpus, found.rate, found.ttft_ms["p50"]) == (MEASURED, 2, 2.0, 40.0)
    closed = {**ROW, "params": {"rate": None}}
    assert measured_points([closed], 1)[0].rate == 1.9


@pytest.mark.parametrize("row", [{}, {**ROW, "result": {}}, {**ROW, "params": None}, []])
def test_other_rows_are_refused(row: Any) -> None:
    with pytest.raises(ConfigError, match="measured row 1 is not one that `flexmoe bench serve --out` writes"):
        measured_points([row], 1)


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from flexmoe.report.simulation import draw

    points = [simulated(), *measured_points([ROW], 8)]
    draw(points, tmp_path / "curves.svg", "a model on a machine")
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw(points, tmp_path / "none" / "curves.svg", "a model")
