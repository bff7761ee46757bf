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
