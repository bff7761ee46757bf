"""benchmarks/collectives.py on two ranks of the CPU: every operation, and what it says was sent."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from flexmoe.bench.collectives import OPS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("collectives")


def test_a_run(collectives: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    collectives.measure(["--device", "cpu", "--sizes", "4KiB-16KiB", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["bytes"], row["op"]) for row in rows] == [(n, op) for n in (4096, 16384) for op in OPS]
    shares = {"all_reduce": 1.0, "all_gather": 0.5, "reduce_scatter": 0.5, "all_to_all": 0.5}
    for row in rows:
        assert row["sent"] == shares[row["op"]] * row["bytes"]
        assert 0 < row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"]
        assert row["mode"] == "eager"


@pytest.mark.parametrize("words", ["4", "4 KiB", "KiB", "4KB-8KB"])
def test_what_is_no_size(collectives: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        collectives.arguments(["--sizes", words])
    assert "is no size; use for instance" in capsys.readouterr().err
