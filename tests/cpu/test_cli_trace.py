"""`flexmoe trace`: every stage is there, in order, with its shape, and nothing stays attached to the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexmoe
from flexmoe import LLM, SamplingParams
from flexmoe.bench.timeline import trace_step
from flexmoe.cli.main import main
from flexmoe.engine import model_runner

OPTIONS = ["--dtype", "float32", "--kv-cache-memory", "64MiB", "--threads", "1"]
OUTSIDE = {"scheduler.schedule", "model_runner", "embedding", "logits", "sampler", "scheduler.update", "detokenizer"}


def trace(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["trace", *arguments, *OPTIONS])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_json(backend: str) -> None:
    record = json.loads(trace("Once upon a time", "--json", "--expert-backend", backend))
    ids = record["prompt_token_ids"]
    assert record["prefill"].keys() >= {"tokenizer", "norm", *OUTSIDE}
    assert record["decode"].keys() >= OUTSIDE
    assert record["prefill"]["attention"]["shape"] == [len(ids), 512]
    assert record["decode"]["attention"] == {**record["decode"]["attention"], "count": 6, "shape": [1, 512]}
    assert record["decode"]["logits"]["shape"] == [1, 8192]
    for step in ("prefill", "decode"):
        stages = record[step]
        assert "moe/block" in stages or {"router", "dispatch", "experts", "combine"} <= stages.keys()
        assert all(stage["milliseconds"] >= 0 for stage in stages.values())
    assert list(record["experts"]) == [str(layer) for layer in range(6)]
    for chosen in record["experts"].values():
        assert len(chosen["topk_ids"]) == 2
        assert sum(chosen["topk_weights"]) == pytest.approx(1)
    with LLM(dtype="float32", kv_cache_memory=2**26, threads=1) as llm:
        expected = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=2))[0]
    assert (ids, record["token_ids"]) == (list(expected.prompt_token_ids), list(expected.token_ids))


def test_the_files_exist() -> None:
    files = json.loads(trace("--json"))["files"]
    house = Path(flexmoe.__file__).parent
    assert [file for file in files.values() if not (house / file).exists()] == []


def test_tables() -> None:
    text = trace("hello [bold] <b>")
    for word in ("'<s>' (1)", "' <'", "scheduler.schedule", "[1, 8192]", "a step", "Experts of ", "layer"):
        assert word in text


def test_nothing_stays_attached() -> None:
    with LLM(dtype="float32", kv_cache_memory=2**26, threads=1) as llm:
        engine = llm.engine
        engine.add_request([1, 5, 6], SamplingParams(max_tokens=3))
        timeline = trace_step(engine)
        count = len(timeline.marks)
        build = model_runner.build_batch
        assert engine.runner.probe is None
        assert build.__module__ == "flexmoe.engine.batch"
        assert "schedule" not in vars(engine.scheduler)
        while engine.has_unfinished:
            engine.step()
        assert len(timeline.marks) == count
