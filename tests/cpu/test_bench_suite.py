"""`flexmoe bench suite`: a job leaves a row, what is there is not measured again, and rows make figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flexmoe.bench import suite, throughput
from flexmoe.bench.own_server import own_server, why_not
from flexmoe.bench.subject import open_subject
from flexmoe.bench.suite import Progress, SuiteOptions
from flexmoe.cli.main import main
from flexmoe.errors import ConfigError, EngineError
from flexmoe.report.charts import figures
from flexmoe.report.rows import read_rows
from tests.openai_server import FakeServer

SMALL = SuiteOptions(
    engines=("flexmoe",),
    batches=(2,),
    concurrencies=(2,),
    requests=3,
    prompt_len=8,
    output_len=4,
    device="cpu",
    threads=1,
)
FAKE_ROW = {"benchmark": "latency", "result": {"ms": 1.0}}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs that only say that they ran."""
    ran: list[str] = []

    def fake(options: SuiteOptions, subject: Any, *what: Any) -> dict[str, Any]:
        ran.append(" ".join(map(str, what)))
        return dict(FAKE_ROW)

    for name in ("_latency", "_throughput", "_profile", "_serving"):
        monkeypatch.setattr(suite, name, fake)
    monkeypatch.setattr(suite, "import_transformers", lambda: None)
    return ran


def test_jobs_are_every_engine_size_and_server_but_those_that_are_there(fakes: list[str]) -> None:
    options = replace(SMALL, engines=("flexmoe", "hf-best"), urls=("http://there",))
    told: list[Progress] = []
    rows = list(suite.run(options, [], told.append))
    assert fakes == ["flexmoe 2", "hf-best 2", "flexmoe", "2", "None 2", "http://there 2"]
    assert [(at.done, at.total) for at in told] == [(n, 6) for n in range(7)]
    assert told[0].left > told[-1].left == 0
    fakes.clear()
    rows[1]["result"] = {"error": "no"}
    again = list(suite.run(options, rows, told.append))
    assert fakes == ["hf-best 2"]
    assert again[0]["suite"] == rows[1]["suite"]
    fakes.clear()
    assert len(list(suite.run(replace(options, output_len=5), rows, told.append))) == 6


def test_a_suite_with_a_server_of_its_own_and_another_makes_figures(tmp_path: Path) -> None:
    out = tmp_path / "suite.jsonl"
    words = "bench suite --engine flexmoe --batch 2 --streams 2 --requests 3 --prompt-len 8 --output-len 4 --device cpu"
    with FakeServer() as server:
        arguments = [*words.split(), "--threads", "1", "--url", server.url, "--out", str(out)]
        first = CliRunner().invoke(main, arguments, catch_exceptions=False)
        measured = out.read_text()
        asked = len(server.requests)
        CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert len(server.requests) == asked
    assert first.exit_code == 0
    rows = [json.loads(line) for line in measured.splitlines()]
    assert [row["benchmark"] for row in rows] == ["latency", "throughput", "profile", "serve", "serve"]
    assert [row["result"].get("succeeded") for row in rows[3:]] == [8, 8]
    assert rows[1]["result"]["output_tokens"] == 12
    assert rows[1]["result"]["percent_of_floor"] > 0
    assert rows[3]["result"]["percent_of_floor"] > 0
    assert rows[3]["result"]["percent_of_first_token_floor"] > 0
    assert "floor_unknown" not in rows[3]["result"]
    assert rows[4]["result"]["floor_unknown"] == "unknown model"
    assert {figure.name for figure in figures(read_rows([out]))} >= {"throughput", "profiled", "served"}
    assert "throughput" in first.output


def test_transformers_answer_in_batches_and_as_many_tokens() -> None:
    with open_subject(None) as subject:
        asked = throughput.ThroughputOptions(
            engine="hf-default", requests=17, prompt_len=4, output_len=2, dtype="float32", device="cpu", threads=1
        )
        row = throughput.measure(subject, asked)
    assert (row["engine"], row["params"]["batch"], row["result"]["output_tokens"]) == ("hf-default", 16, 34)


def test_a_preset_has_no_tokenizer_and_is_not_served() -> None:
    with open_subject("olmoe-1b-7b") as subject:
        assert why_not(subject) == "olmoe-1b-7b has no tokenizer, so it cannot be served"


def test_a_server_that_does_not_start_says_why() -> None:
    with open_subject(None) as subject, pytest.raises(EngineError, match=r"did not start: .*no-such-option"):  # noqa: SIM117
        with own_server(subject, ["--no-such-option"]):
            pass


def test_engines_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine='vllm' is not one of"):
        SuiteOptions(engines=("vllm",))
    (tmp_path / "rows.jsonl").write_text("no rows\n")
    with pytest.raises(ConfigError, match="is no file of rows"):
        suite.read(tmp_path / "rows.jsonl")
