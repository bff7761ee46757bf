"""benchmarks/strategies.py: its formulas, its imbalance, and a run whose bytes are the formulas' exactly."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmoe.config.plan import ParallelPlan
from flexmoe.models.presets import PRESETS
from tests.cpu.tiny_models import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def strategies(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("strategies")
    monkeypatch.setattr(module, "read_bandwidth", lambda _: 1e10)  # it takes a second, and half a gigabyte
    return module


def chosen(strategies: Any, *rows: list[int]) -> Any:
    """One layer and one step of so many rows."""
    found = strategies.Choices(len(rows))
    found.record("topk_ids", 0, torch.tensor(rows))
    return found


def test_every_strategy_is_there(strategies: Any) -> None:
    names = ["tensor", "expert, all-reduce", "expert, all-to-all", "data, experts spread"]
    assert [s.name for s in strategies.setups(2)] == names
    four = [(s.plan.expert_parallel_size, s.plan.expert_tensor_size) for s in strategies.setups(4)]
    assert four == [(1, 4), (4, 1), (4, 1), (4, 1), (2, 2), (2, 2)]
    assert len(strategies.setups(3)) == 4


def test_an_all_reduce_does_not_depend_on_choices(strategies: Any) -> None:
    config, plan = PRESETS["mixtral-8x7b"].config, ParallelPlan(4, 4)
    sent = strategies.formula(config, plan, 8, 2, strategies.Choices(8))
    one = 2 * 3 * 4096 * 2
    assert sent == {"embedding": one, "linear": 32 * one, "combine": 32 * one, "logits": 3 * 8000 * 2}


def test_copies_and_imbalance(strategies: Any) -> None:
    """Experts 0-3 on the first rank, 4-7 on the second; the first row is the first rank's, the other the second's."""
    config, plan = PRESETS["mixtral-8x7b"].config, ParallelPlan(2, 2, moe_dispatch="all_to_all")
    away_and_home = chosen(strategies, [0, 5], [1, 2])
    sent = strategies.formula(config, plan, 2, 2, away_and_home)
    assert sent["dispatch"] == sent["combine"] == 1.0 * 4096 * 2  # row 0 once, row 1 once
    assert strategies.imbalance(config, plan, away_and_home) == {"run": 1.5, "step": 1.5}
    at_home = chosen(strategies, [0, 1], [4, 5])
    assert strategies.formula(config, plan, 2, 2, at_home)["dispatch"] == 0
    assert strategies.imbalance(config, ParallelPlan(2), at_home) == {"run": 1.0, "step": 1.0}


def test_a_run(strategies: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    words = [str(tiny("qwen2_moe")), "--batch", "1,3", "--prompt-len", "12", "--output-len", "4", "--out", str(out)]
    strategies.main([*words, "--note", "a test"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["config"]["strategy"], row["params"]["batch"]) for row in rows] == [
        (name, batch)
        for name in ("one process, torch", "one process, as it comes", *(s.name for s in strategies.setups(2)))
        for batch in (1, 3)
    ]
    for row in rows:
        result = row["result"]
        assert result["equal_answers"] == row["params"]["batch"]
        if not row["config"]["strategy"].startswith("data"):
            assert result.get("sent_bytes_per_token") == result.get("formula_bytes_per_token")
        assert row["note"] == "a test"
    assert {"dispatch", "combine", "rows"} <= rows[-3]["result"]["sent_bytes_per_token"].keys()
    assert {"dispatch", "combine", "routing"} <= rows[-1]["result"]["sent_bytes_per_token"].keys()
    assert "NOT" not in capsys.readouterr().out


def test_what_does_not_fit_becomes_a_row(strategies: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = [str(tiny("mixtral")), "--ranks", "3", "--batch", "1", "--prompt-len", "8", "--output-len", "2"]
    strategies.main([*words, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in row["result"] for row in rows] == [False, False, True, True, True, False]


def test_prompts_and_many_requests(strategies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_MANY", (6, 3))
    out = tmp_path / "rows.jsonl"
    words = [str(tiny("mixtral")), "--batch", "1", "--prompt-len", "8", "--output-len", "2", "--only", "tensor"]
    strategies.main([*words, "--prompts", "5,20,100000", "--requests", "4", "--out", str(out)])  # one is too long
    rows = [json.loads(line) for line in out.read_text().splitlines() if '"tensor"' in line]
    asked = [(row["benchmark"], row["params"]["batch"], row["params"]["prompt_len"]) for row in rows]
    prompts = "strategies_prompts"
    assert asked == [("strategies", 1, 8), (prompts, 1, 5), (prompts, 1, 20), (prompts, 4, 6)]
    assert rows[1]["result"]["first_token_ms"]["median"] > 0
    assert rows[3]["result"]["output_tokens_per_s"] == pytest.approx(12 / rows[3]["result"]["seconds"], rel=0.01)


def test_predictions_stand_where_a_run_would_measure(strategies: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["olmoe-1b-7b", "--ranks", "4", "--batch", "1,8", "--dtype", "bfloat16", "--prompts", "512"]
    strategies.main([*words, "--requests", "8", "--predict", "h200x8", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["one process, as it comes", *(setup.name for setup in strategies.setups(4))]
    assert [row["config"]["strategy"] for row in rows] == [name for name in names for _ in range(4)]
    assert {row["benchmark"] for row in rows} == {"strategies_predicted"}
    one, tensor = rows[:4], rows[4:8]
    for kind in ("step_ms", "step_ms", "first_token_ms", "seconds"):
        here, there = one.pop(0)["result"], tensor.pop(0)["result"]
        assert there[kind] < here[kind]
        if kind != "seconds":
            assert here[kind] == pytest.approx(sum(here["terms_ms"].values()), abs=0.01)
