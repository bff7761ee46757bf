"""`flexmoe bench throughput`: rows of many requests at once, and how busy the device was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from flexmoe.bench.busy import busy_share, covered
from flexmoe.bench.engines import greedy
from flexmoe.bench.throughput import ThroughputOptions
from flexmoe.cli.main import main
from flexmoe.config.engine import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.errors import ConfigError


def test_the_command_appends_a_row_for_each_engine_and_prints_a_table(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = "bench throughput --requests 5 --prompt-len 8 --output-len 4 --max-num-seqs 3 --device cpu --threads 1"
    words += f" --dtype float32 --engine flexmoe,hf-default --out {out}"
    done = CliRunner().invoke(main, words.split(), catch_exceptions=False)
    assert done.exit_code == 0
    ours, theirs = (json.loads(line) for line in out.read_text().splitlines())
    assert (ours["benchmark"], ours["engine"], theirs["engine"]) == ("throughput", "flexmoe", "hf-default")
    assert ours["params"] | {"seed": 0} == ours["params"]
    result = ours["result"]
    assert (result["output_tokens"], theirs["result"]["output_tokens"]) == (20, 20)
    # Three seats for four tokens each, then two: a prompt's step samples its first token.
    assert result["steps"] == 8
    assert result["total_tokens_per_s"] == pytest.approx(3 * result["output_tokens_per_s"], rel=1e-3)
    assert 0 < result["device_busy_percent"] <= 100
    assert "device_busy_percent" not in theirs["result"]
    assert ours["config"]["max_num_seqs"] == 3
    assert "5 requests, 8 tokens in, 4 out" in done.output
    assert "builtin: flexmoe, 5 requests of 8 + 4 tokens" in done.stderr
    assert "% busy: of the time that the device worked" in " ".join(done.stdout.split())


def test_a_preset_with_fewer_layers(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = "bench throughput tinymistral-6x248m --layers 1 --requests 2 --prompt-len 4 --output-len 2 --device cpu"
    done = CliRunner().invoke(main, [*words.split(), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert (row["model"]["layers"], row["model"]["label"]) == (1, "tinymistral-6x248m with 1 of 12 layers")


def test_an_engine_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine='hf-best' is not one of flexmoe, hf-default"):
        ThroughputOptions(engine="hf-best")
    done = CliRunner().invoke(main, ["bench", "throughput", "--engine", "vllm"])
    assert done.exit_code != 0
    assert "'vllm' is not one of" in done.output


def test_no_more_requests_run_together_than_the_kernels_take() -> None:
    assert ThroughputOptions(requests=1000).seats == 512
    assert ThroughputOptions(requests=10).seats == 10
    assert ThroughputOptions(requests=10, max_num_seqs=4).seats == 4


def test_overlapping_spans_count_once() -> None:
    assert covered([(5.0, 1.0), (0.0, 2.0), (1.0, 2.0), (1.5, 0.5)]) == 4.0
    assert covered([]) == 0.0


def test_watching_leaves_the_engine_as_it_was() -> None:
    engine = Engine(EngineConfig.from_options({"device": "cpu", "threads": 1, "num_blocks": 16}))
    try:
        engine.add_request([1, 2, 3], greedy(6))
        assert 0 < busy_share(engine, 3) < 1
        assert "launch" not in vars(engine.runner)
        assert engine.has_unfinished
        assert 0 < busy_share(engine, 100) < 1
        assert not engine.has_unfinished
    finally:
        engine.close()
