"""benchmarks/course_experiment.py: its prompt and shapes reach the rows, and a report knows these."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from flexmoe.bench.latency import LatencyOptions
from flexmoe.errors import ConfigError
from flexmoe.report.charts import experts
from flexmoe.report.rows import read_rows
from tests.cpu.engine_clock import EngineClock

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    EngineClock(monkeypatch)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("course_experiment")


def test_rows_of_one_and_two_experts_make_the_figure(
    experiment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    words = "--experts 1,2 --layers 1 --tokens 2 --engine flexmoe --device cpu --threads 1 --out".split()
    experiment.main([*words, str(out)])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"]["experts"], row["model"]["top_k"]) for row in found] == [(1, 1), (2, 2)]
    assert {row["params"]["prompt"] for row in found} == {experiment.PROMPT}
    assert {row["params"]["prompt_len"] for row in found} == {len(experiment.prompt_ids())}
    assert "2 experts  flexmoe" in capsys.readouterr().out
    figure = experts(read_rows([out]))
    assert figure is not None
    assert [point.x for point in figure.panels[0].series[0].points] == ["1", "2"]


def test_a_prompt_of_another_length_than_told_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt_len=128 is not the prompt's length; use 3"):
        LatencyOptions(prompt=[1, 2, 3])
