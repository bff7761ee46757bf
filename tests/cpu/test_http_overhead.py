"""benchmarks/http_overhead.py: one row, with the ratio of its two sides; no row where a request failed."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexmoe.bench.subject import open_subject
from flexmoe.errors import EngineError
from tests.openai_server import FakeServer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = "--concurrency 2 --num-requests 4 --input-len 5 --output-len 6 --threads 1 --kv-cache-memory 67108864".split()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("http_overhead")


def serve(benchmark: Any, monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> list[dict[str, Any]]:
    """Let `server` be the one that the script starts; returns the options that it would be started with."""
    started: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def fake(_: Any, options: dict[str, Any]) -> Iterator[str]:
        started.append(options)
        yield server.url

    monkeypatch.setattr(benchmark, "_server", fake)
    return started


def test_one_row_with_the_ratio(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    with FakeServer(gap=0.001) as server:
        started = serve(benchmark, monkeypatch, server)
        benchmark.main([*WORDS, "--rounds", "2", "--out", str(out)])
    (row,) = map(json.loads, out.read_text().splitlines())
    result = row["result"]
    sides = [side["output_tokens_per_s"] for side in result["http"]]
    assert len(sides) == result["rounds"] == 2
    assert result["http_tokens_per_s"]["median"] == pytest.approx(sum(sides) / 2, rel=1e-3)
    assert 0 < result["ratio"]["p20"] <= result["ratio"]["p80"]
    assert [options["max_num_seqs"] for options in started] == [2, 2]
    assert row["config"]["model"] == row["model"]["name"] == "builtin"
    asked = [tuple(request["prompt"]) for request in server.requests]
    assert len(set(asked)) == 2 * (2 + 4)  # in each round others, and others to warm up
    assert {request["max_tokens"] for request in server.requests} == {6}
    assert "through HTTP" in capsys.readouterr().out


def test_a_server_that_does_not_start(benchmark: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with open_subject(None) as subject:
        server = benchmark._server(subject, {"no_such_option": 1})
        with pytest.raises(EngineError, match=r"the server did not start \(exit status 2, "), server:
            pass
    assert "Error: No such" in capfd.readouterr().err


def test_no_row_if_a_request_fails(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer(dict.fromkeys(range(9), "500")) as server:
        serve(benchmark, monkeypatch, server)
        with pytest.raises(EngineError, match=r"0 tokens of 24: {'HTTP 500': 4}"):
            benchmark.main([*WORDS, "--rounds", "1"])
