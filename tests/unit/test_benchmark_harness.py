"""benchmarks/harness: what is counted, who is compared with whom, and that only one engine works at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _harness_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are run from their folder, so it is what they import from."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class FakeWorker:
    """Takes `seconds` a call, answers with its own name, and writes its turn down."""

    def __init__(self, name: str, seconds: float, turns: list[str]) -> None:
        self.name, self.seconds, self.turns, self.cpu_seconds = name, seconds, turns, 0.0

    def run(self, prompts: Any, max_tokens: int, variant: Any, *, warmup: int, repeats: int) -> dict[str, Any]:
        self.turns.append(self.name)
        self.cpu_seconds += self.seconds
        call = {"first": self.seconds, "total": self.seconds * max_tokens, "tokens": [[len(self.name)]] * len(prompts)}
        return {"calls": [call] * repeats}


def test_figures_of_a_call() -> None:
    from harness.setups import Load

    call = {"first": 0.5, "total": 2.5}
    assert Load("m", 1, 64, 5, "tpot").value(call) == pytest.approx(500.0)
    assert Load("m", 1, 64, 1, "ttft").value(call) == pytest.approx(500.0)


def test_every_configuration_is_tried_once() -> None:
    from harness.setups import REFERENCE, transformers_setups

    setups = transformers_setups(quick=False, max_autotune=False)
    assert len(set(setups)) == len(setups) == 2 * 3 * 3
    assert REFERENCE in setups
    assert REFERENCE in transformers_setups(quick=True, max_autotune=False)
    assert len(transformers_setups(quick=False, max_autotune=True)) == 2 * 3 * 4


def test_rounds_rotate_and_count_answers_like_the_reference() -> None:
    from harness.finals import play
    from harness.setups import OURS, REFERENCE, Load

    turns: list[str] = []
    auto, fp32 = OURS[:2]
    workers: dict[Any, Any] = {
        auto.worker_key: FakeWorker("auto", 0.1, turns),
        fp32.worker_key: FakeWorker("reference too", 0.2, turns),  # as long a name as the reference's: equal answers
        REFERENCE.worker_key: FakeWorker("the reference", 0.3, turns),
    }
    load = Load("decode", 2, 8, 11, "tpot")
    tallies = play(load, [auto, fp32], workers, [[[1], [2]]] * 3)
    assert turns == ["the reference", "auto", "reference too", "the reference", "reference too", "auto",
                         "the reference", "auto", "reference too"]  # fmt: skip
    assert tallies[auto].samples == pytest.approx([100.0, 100.0])
    assert tallies[auto].equal == 0
    assert tallies[fp32].equal == 2 * 2
    assert tallies[auto].idle == 0.0


def test_the_memory_is_measured_before_and_after_each_turn() -> None:
    from harness.finals import Pace, play
    from harness.setups import OURS, Load

    turns: list[str] = []
    rates = iter([10.0, 20.0, 40.0, 60.0, 20.0, 30.0])

    def stream() -> float:
        turns.append("stream")
        return next(rates)

    auto, fp32 = OURS[:2]
    workers: dict[Any, Any] = {s.worker_key: FakeWorker(s.dtype, 0.1, turns) for s in (auto, fp32)}
    tallies = play(Load("decode", 1, 8, 11, "tpot"), [auto, fp32], workers, [[[1]]] * 2, None, Pace(), stream)
    assert turns == ["stream", "auto", "stream", "float32", "stream", "stream", "float32", "stream", "auto", "stream"]
    assert (tallies[fp32].reads, tallies[auto].reads) == ([40.0], [25.0])
    assert len(tallies[auto].samples) == 1


def test_the_peer_is_the_best_of_theirs() -> None:
    from harness.table import Result, verdicts

    def result(name: str, median: float, metric: str = "decode_bs1") -> Any:
        return Result(metric, name, name.startswith("flexmoe"), "ms", {"median": median})

    (found,) = verdicts(
        [
            result("flexmoe auto", 2.0),
            result("flexmoe bfloat16", 1.0),
            result("transformers slow", 9.0),
            result("transformers fast", 3.8),
        ]
    )
    assert (found.theirs.name, found.ratio, found.holds) == ("transformers fast", pytest.approx(1.9), False)


def test_a_row_is_one_line_of_json(tmp_path: Path) -> None:
    from harness import record

    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "vocab_size": 7}')
    facts = record.facts(tmp_path, threads=2)
    assert {"commit", "device", "versions", "threads", "model", "load_average", "uncommitted"} <= set(facts)
    assert facts["model"]["vocab_size"] == 7
    file = tmp_path / "results" / "rows.jsonl"
    for _ in range(2):
        record.append(file, facts | record.summary([3.0, 1.0, 2.0]))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["median"] == 2.0
    assert rows[0]["samples"] == [3.0, 1.0, 2.0]


def test_prompts_have_the_length_asked_for_and_follow_the_seed(tmp_path: Path) -> None:
    from harness.prompts import make_prompts

    (tmp_path / "config.json").write_text('{"vocab_size": 50}')
    first = make_prompts(tmp_path, 3, 20, seed=1)
    assert [len(prompt) for prompt in first] == [20] * 3
    assert first == make_prompts(tmp_path, 3, 20, seed=1)
    assert first != make_prompts(tmp_path, 3, 20, seed=2)


def test_a_throughput_is_all_tokens_a_second() -> None:
    from harness.setups import Load

    load = Load("m", 32, 64, 64, "rate")
    assert load.value({"first": 0.5, "total": 4.0}) == 32 * 64 / 4
    assert load.unit == "tokens/s"


def test_ours_is_held_against_the_best_peer_of_equal_precision() -> None:
    from harness.peers import Figure, verdicts
    from harness.setups import Setup

    def figure(kind: str, dtype: str, median: float, metric: str = "decode_bs1", unit: str = "ms") -> Any:
        return Figure("60M", metric, Setup(kind, dtype), unit, {"median": median}, None)

    bf16, int8, rate = verdicts(
        [
            figure("flexmoe", "bfloat16", 2.0),
            figure("flexmoe", "int8", 1.0),
            figure("llama.cpp", "bf16", 2.5),
            figure("llama.cpp", "q8_0", 4.0),
            figure("transformers", "bfloat16", 9.0),
            figure("flexmoe", "bfloat16", 300.0, "throughput_32", "tokens/s"),
            figure("llama.cpp", "bf16", 100.0, "throughput_32", "tokens/s"),
            figure("transformers", "bfloat16", 200.0, "throughput_32", "tokens/s"),
        ]
    )
    assert (bf16.peer.setup.kind, bf16.ratio, bf16.limit) == ("llama.cpp", 0.8, 0.9)
    assert (int8.peer.setup.dtype, int8.ratio) == ("q8_0", 0.25)
    assert (rate.peer.setup.kind, rate.ratio, rate.limit) == ("transformers", pytest.approx(2 / 3), None)


def test_floors_of_loads_and_of_a_start() -> None:
    from harness.floors import Floors
    from harness.setups import Load

    from flexmoe.models.presets import PRESETS

    floors = Floors(PRESETS["mixtral-8x7b"].config, 100e9)
    step = floors.of_load(Load("d", 1, 64, 24, "tpot"), [2.0] * 32, 510.0, "bfloat16")
    assert step["floor_ms"] == pytest.approx(255, abs=1)  # 25.5 GB
    assert step["percent_of_floor"] == pytest.approx(50, abs=0.3)
    assert step["distinct_experts"] == 2.0
    eight = floors.of_load(Load("d", 1, 64, 24, "tpot"), [2.0] * 32, 510.0, "bfloat16", "int8")
    assert eight["floor_ms"] / step["floor_ms"] == pytest.approx(8.5 / 16, abs=1e-3)
    rate = floors.of_load(Load("t", 1, 64, 24, "rate"), [2.0] * 32, 24 / (23 * 0.510), "bfloat16")
    assert rate["percent_of_floor"] == pytest.approx(step["percent_of_floor"], abs=0.01)
    prompt = floors.of_load(Load("p", 1, 512, 1, "ttft"), [2.0] * 32, 9310.0, "bfloat16")
    assert (prompt["percent_of_floor"], prompt["distinct_experts"]) == (pytest.approx(10, abs=0.1), 8.0)
    assert floors.of_start(9.34, "bfloat16")["percent_of_floor"] == pytest.approx(10, abs=0.1)  # 93.4 GB
