"""benchmarks/kernels/harness.py without a GPU: what is timed, what fails, what is written."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "benchmarks" / "kernels"


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int
    num_warps: int = 4


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, where a launch takes as many microseconds as its closure says, and memory reads 1 TB/s."""
    monkeypatch.syspath_prepend(str(KERNELS))
    monkeypatch.delitem(sys.modules, "harness", raising=False)  # benchmarks/harness has the same name
    module: ModuleType = importlib.import_module("harness")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(module, "read_bandwidth", lambda _device: 1e12)
    monkeypatch.setattr(module, "facts", lambda _device: {"device": {"name": "a GPU"}})
    monkeypatch.setattr(module, "time_launches", lambda launches: module.Timing(launches[0](), 0.5, 2.0))
    yield module
    sys.modules.pop("harness", None)


def case(harness: Any, name: str, microseconds: float, rows: int = 1) -> Any:
    launches: Callable[[], list[Callable[[], float]]] = lambda: [lambda: microseconds]
    return harness.Case(name, {"tile": Tile(rows), "dtype": torch.bfloat16}, 2_000_000, launches)


def run(harness: Any, monkeypatch: pytest.MonkeyPatch, cases: Any, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["topk.py", *arguments])
    harness.run("topk", cases)


def test_rows_and_table(
    harness: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    cases = [case(harness, "mixtral b1", 8.0, 1), case(harness, "mixtral b1", 4.0, 2), case(harness, "olmoe b1", 5.0)]
    run(harness, monkeypatch, cases, "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["us"] for row in rows] == [8.0, 4.0, 5.0]
    expected = {"op": "topk", "name": "mixtral b1", "gb_s": 500.0, "percent": 50.0, "bytes": 2_000_000}
    assert expected.items() <= rows[1].items()
    assert rows[1]["params"] == {"tile": {"rows": 2, "num_warps": 4}, "dtype": "torch.bfloat16"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "topk on a GPU: a plain read reaches 1,000 GB/s"
    table = printed[printed.index("mixtral b1: 2.000 MB, 2 cases") + 2 :]
    assert table[0].split() == "4.00 0.50 2.00 500 50.0 rows=2 num_warps=4 dtype=torch.bfloat16".split()
    assert table[1].split()[0] == "8.00"


def test_a_failing_case_is_told_and_skipped(
    harness: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> list[Any]:
        raise RuntimeError("out of resource: shared memory\nRequired ...")

    bad = harness.Case("mixtral b1", {"tile": Tile(9)}, 1, fail)
    run(harness, monkeypatch, [bad, case(harness, "mixtral b1", 4.0)])
    printed = capsys.readouterr().out
    assert "failed: mixtral b1 rows=9 num_warps=4: RuntimeError out of resource: shared memory\n" in printed
    assert "mixtral b1: 2.000 MB, 1 cases" in printed


def test_filter_and_limit(harness: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [case(harness, "mixtral b1", 4.0, rows) for rows in (1, 2, 16)]
    run(harness, monkeypatch, cases, "--filter", "mixtral.*rows=2 ")
    assert "1 cases" in capsys.readouterr().out
    run(harness, monkeypatch, cases, "--limit-seconds", "-1")
    assert "stopped after -1 s, before mixtral b1 rows=1" in capsys.readouterr().out


def test_without_a_gpu(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="The benchmark of topk needs a CUDA device"):
        run(harness, monkeypatch, [])
