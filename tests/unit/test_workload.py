"""planner/workload.py: figures, JSON and traces as requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.errors import ConfigError
from flexmoe.planner.workload import Workload


def trace_file(folder: Path, requests: int = 200) -> Path:
    lines = [f"2023-11-16 18:{n // 60:02}:{n % 60:02}.0,{100 + n},{10 + n % 7}" for n in range(requests)]
    path = folder / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_figures_become_requests_within_their_ranges() -> None:
    workload = Workload(input_len=(10, 20), output_len=(1, 5), rate=4.0, num_requests=500)
    requests = workload.requests()
    assert len(requests) == 500
    assert all(10 <= r.input_len <= 20 and 1 <= r.output_len <= 5 for r in requests)
    assert [r.arrival for r in requests] == sorted(r.arrival for r in requests)
    demand = workload.demand()
    assert demand.rate == 4.0
    assert demand.mean_input == pytest.approx(15, abs=0.5)
    assert demand.longest <= 25


def test_duration_bounds_the_arrivals() -> None:
    requests = Workload(rate=10, duration=60).requests()
    assert requests[-1].arrival <= 60
    assert len(requests) == pytest.approx(600, rel=0.15)


def test_a_workload_survives_json() -> None:
    workload = Workload(input_len=(1, 9), rate=2.5, slo_ttft_ms=500, slo_tpot_ms=50, seed=3)
    assert Workload.from_json(workload.to_json()) == workload


def test_a_trace_has_its_own_rate_and_lengths(tmp_path: Path) -> None:
    workload = Workload.read(trace_file(tmp_path))
    assert len(workload.requests()) == 200
    assert workload.demand().rate == pytest.approx(1.0)


@given(st.floats(0.2, 6.0))
def test_a_trace_is_thinned_or_overlaid_to_a_rate(tmp_path_factory: pytest.TempPathFactory, rate: float) -> None:
    path = trace_file(tmp_path_factory.mktemp("trace"))
    requests = Workload(trace=str(path), rate=rate).requests()
    assert len(requests) == pytest.approx(200 * rate, abs=1 + 0.5 * 200**0.5 * 5)
    assert [r.arrival for r in requests] == sorted(r.arrival for r in requests)
    assert requests[-1].arrival <= 199


def test_a_json_file_names_its_trace_from_where_it_lies(tmp_path: Path) -> None:
    trace_file(tmp_path)
    (tmp_path / "workload.json").write_text('{"trace": "trace.csv", "length_scale": 0.1}', encoding="utf-8")
    assert Workload.read(tmp_path / "workload.json").requests()[0].input_len == 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a workload is a JSON object, not list"),
        ({"rat": 3}, "did you mean 'rate'"),
        ({"rate": 0}, "rate=0 of the workload is not a positive number"),
        ({"rate": True}, "rate=True"),
        ({"input_len": [9, 3]}, "input_len=\\[9, 3\\] of the workload does not go upwards from 1"),
        ({"output_len": "many"}, "neither a number of tokens nor two"),
        ({"num_requests": 1.5}, "not an integer"),
        ({"trace": 7}, "trace=7 of the workload is not the name of a file"),
    ],
)
def test_what_is_no_workload_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload.from_json(data)


def test_files_that_are_no_workload_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Workload.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="refused: it is not JSON"):
        Workload.read(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Workload.read(tmp_path / "none.csv").requests()
