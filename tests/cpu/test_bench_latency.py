"""`flexmoe bench latency`: its rows are well-formed and its figures follow from one another; wrong use is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from flexmoe.bench import bandwidth, latency
from flexmoe.bench.hugging_face import DEFAULT, HuggingFace, Setup
from flexmoe.bench.latency import LatencyOptions, first_difference, measure
from flexmoe.bench.record import append, facts, summary
from flexmoe.bench.subject import Changes
from flexmoe.cli.main import main
from flexmoe.errors import ConfigError
from tests.cpu.engine_clock import EngineClock
from tests.cpu.tiny_decoders import NEEDS_COMPILER
from tests.cpu.tiny_models import tiny

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> EngineClock:
    return EngineClock(monkeypatch)


def bench(*arguments: str) -> Result:
    lengths = ["--prompt-len", "6", "--output-len", "4", "--device", "cpu", "--threads", "1"]
    return CliRunner().invoke(main, ["bench", "latency", *arguments, *lengths])


def rows_in(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_figures(row: Row) -> None:
    result, batch = row["result"], row["params"]["batch"]
    assert result["ms"] == result["first_token_ms"] == 1.0
    share = 100 * result["first_token_floor_ms"] / result["first_token_ms"]
    assert result["percent_of_first_token_floor"] == pytest.approx(share, rel=0.05, abs=0.01)
    assert result["tokens_per_s"] == pytest.approx(1e3 * batch / result["ms"], rel=1e-2)
    assert result["percent_of_floor"] == pytest.approx(100 * result["floor_ms"] / result["ms"], rel=1e-2)
    assert result["floor_ms"] == pytest.approx(1e3 * sum(result["floor_bytes"].values()) / 10e9, abs=1e-4)
    distinct = result["distinct_by_layer"]
    assert result["distinct_experts"] == pytest.approx(sum(distinct) / len(distinct), abs=0.01)
    assert result["peak_memory_gib"] > 0


def test_the_builtin_model(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    done = bench("--batch", "1,3", "--out", str(out))
    assert done.exit_code == 0, done.output
    rows = rows_in(out)
    assert [(row["engine"], row["params"]["batch"]) for row in rows] == [("flexmoe", 1), ("flexmoe", 3)]
    for row in rows:
        assert row["benchmark"] == "latency"
        assert row["model"]["name"] == row["config"]["model"] == "builtin"
        assert row["model"]["load_format"] == "auto"
        assert {"time", "commit", "device", "versions"} <= row.keys()
        check_figures(row)
        assert set(row["result"]["step_ms"]) == {"median", "p20", "p80"}
        assert row["result"]["first_token_s"] > row["result"]["ready_s"] > 0
        assert "equal_answers" not in row["result"]
    assert all(row["result"]["distinct_counted"] for row in rows)
    assert rows[0]["result"]["distinct_experts"] == rows[0]["model"]["top_k"]
    table = done.stdout
    assert table.startswith("builtin: MixtralForCausalLM")
    assert "reads 10 GB/s" in table
    assert "the mean of 4 timed one by one, others' (time for 5 tokens - time for 1) / 4" in " ".join(table.split())


def test_a_time_that_ran_backwards_is_no_figure_but_an_error(clock: EngineClock, tmp_path: Path) -> None:
    """On a busy machine the prompts alone can take longer than prompts and steps."""
    clock.seconds = lambda count: 2.0 / count
    done = bench("--batch", "1", "--out", str(tmp_path / "rows.jsonl"))
    assert done.exit_code == 0, done.output
    (row,) = rows_in(tmp_path / "rows.jsonl")
    assert "too busy to measure" in row["result"]["error"]
    assert "failed: the machine was too busy" in " ".join(done.stdout.split())


def test_the_better_of_two_times_counts(clock: EngineClock) -> None:
    """A time that something else on the machine made longer is none of the engine's."""
    calls = iter(range(100))
    clock.seconds = lambda count: 0.001 * count + (0.5 if next(calls) % 2 else 0.0)
    clock.step = 0.001
    options = LatencyOptions(model=str(tiny("mixtral")), batches=(1,), prompt_len=4, output_len=2, threads=1)
    (row,) = measure(options)
    assert row["result"]["ms"] == row["result"]["first_token_ms"] == 1.0


@NEEDS_COMPILER
def test_beside_transformers(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    engines = "flexmoe,hf-default,hf-best"
    model = ["tinymistral-6x248m", "--layers", "1", "--experts", "4", "--dtype", "float32"]
    done = bench(*model, "--engine", engines, "--batch", "2", "--hf-seconds", "0", "--out", str(out))
    assert done.exit_code == 0, done.output
    ours, default, best = rows_in(out)
    assert [row["engine"] for row in (ours, default, best)] == engines.split(",")
    assert ours["model"]["label"] == "tinymistral-6x248m with 1 of 12 layers, 4 experts"
    assert (ours["model"]["layers"], ours["model"]["experts"]) == (1, 4)
    for row in (ours, default, best):
        check_figures(row)
        assert row["result"]["floor_bytes"] == ours["result"]["floor_bytes"]
        assert row["params"] == ours["params"]
    assert default["result"]["equal_answers"] == best["result"]["equal_answers"] == 2
    assert default["result"]["first_difference"] is None
    tried = list(best["config"]["tried"].values())
    assert tried[0] == best["result"]["ms"]
    assert set(tried[1:]) == {"not tried: out of time"}
    assert "2 of 2" in done.stdout
    assert "hf-best at batch 2: grouped_mm experts, dynamic cache" in done.stdout


@NEEDS_COMPILER
def test_the_best_of_what_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, good = Setup("batched_mm", "static"), Setup("eager")
    monkeypatch.setattr("flexmoe.bench.hugging_face.candidates", lambda *_: [broken, DEFAULT, good])
    use, times = HuggingFace.use, {DEFAULT: 0.002, good: 0.001}

    def use_or_fail(self: HuggingFace, setup: Setup) -> None:
        if setup == broken:
            raise RuntimeError("out of memory\nand more")
        use(self, setup)

    def time(_bench: object, engine: Any, prompts: Any, _warmups: int) -> latency.Timing:
        seconds = times[engine.setup] if isinstance(engine, HuggingFace) else 0.0005
        return latency.Timing(seconds, 0.1, [[7] * 3 for _ in prompts])

    monkeypatch.setattr(HuggingFace, "use", use_or_fail)
    monkeypatch.setattr("flexmoe.bench.latency._Bench._time", time)
    told: list[str] = []
    options = LatencyOptions(
        model=str(tiny("mixtral")), engines=("hf-best", "flexmoe"), batches=(2,), prompt_len=4, output_len=2
    )
    ours, best = measure(options, told.append)
    assert (ours["engine"], best["engine"]) == ("flexmoe", "hf-best")
    assert best["result"]["ms"] == 1.0
    assert best["config"]["description"] == "eager experts, dynamic cache"
    assert list(best["config"]["tried"].values()) == ["RuntimeError: out of memory", 2.0, 1.0]
    assert told[-1] == "hf-best: batch 2, eager experts, dynamic cache"


@NEEDS_COMPILER
def test_an_engine_that_cannot_is_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_self: HuggingFace, _setup: Setup) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HuggingFace, "use", fail)
    out = tmp_path / "rows.jsonl"
    done = bench(str(tiny("mixtral")), "--engine", "hf-default", "--batch", "1", "--out", str(out))
    assert done.exit_code == 0, done.output
    (row,) = rows_in(out)
    assert row["result"] == {"error": "RuntimeError: out of memory"}
    assert "failed:" in done.stdout


def test_dense_models_have_a_floor_too() -> None:
    options = LatencyOptions(model=str(tiny("llama")), batches=(1,), prompt_len=4, output_len=2, threads=1)
    (row,) = measure(options)
    assert row["result"]["distinct_by_layer"] == []
    assert row["result"]["distinct_experts"] == 0


def test_without_a_step_of_all_the_floor_is_that_of_uniform_routing() -> None:
    model = {"model": str(tiny("mixtral")), "batches": (3,), "prompt_len": 8, "output_len": 1, "threads": 1}
    (row,) = measure(LatencyOptions(**model, llm={"max_num_batched_tokens": 8}))  # one prompt a step
    assert not row["result"]["distinct_counted"]
    assert row["result"]["distinct_experts"] == pytest.approx(4 * (1 - 0.5**3))
    assert row["result"]["step_ms"] is None


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--batch", "0,2"], "'0,2' is not a list of positive integers", 2),
        (["--batch", "1,"], "'1,' is not a list of positive integers", 2),
        (["--engine", "flexmo"], "'flexmo' is not one of flexmoe, hf-best, hf-default", 2),
        (["--layers", "2"], "fit no stored weights; give a preset", 1),
        (["olmoe-1b-7b", "--experts", "4"], "num_experts_per_tok=8 is above the number of experts, 4", 1),
        (["no-such-folder/", "--batch", "1"], "does not exist", 1),
    ],
)
def test_wrong_use(arguments: list[str], message: str, status: int) -> None:
    done = bench(*arguments)
    assert done.exit_code == status
    assert message in " ".join(done.stderr.split())


def test_wrong_options_in_python() -> None:
    with pytest.raises(ConfigError, match="engine='vllm' is not one of"):
        LatencyOptions(engines=("vllm",))
    with pytest.raises(ConfigError, match="give a preset"):
        next(measure(LatencyOptions(changes=Changes(top_k=1))))


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 4]) == 1


# ------------------------------------------------------------------------------------------------ records, bandwidth


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    append(path, {"a": 1})
    append(path, {"b": "é"})
    assert rows_in(path) == [{"a": 1}, {"b": "é"}]


def test_facts_name_device_and_versions() -> None:
    found = facts(torch.device("cpu"))
    assert found["device"]["kind"] == "cpu"
    assert found["device"]["name"]
    assert found["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_summary() -> None:
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "p20": 1.4, "p80": 2.6}


def test_memory_is_read_at_a_believable_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_CPU_BYTES", 2**26)
    assert 1e8 < bandwidth.read_bandwidth(torch.device("cpu"), 0.02) < 1e12
