"""LLM(plan="auto"), and an engine that compares its steps with their prediction."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from flexmoe import LLM, SamplingParams
from flexmoe.config.plan import ParallelPlan
from flexmoe.errors import ConfigError
from flexmoe.planned import make_engine
from tests.cpu.serving import GREEDY, open_llm


def test_an_engine_without_a_machine_watches_nothing() -> None:
    with open_llm("mixtral") as llm:
        assert llm.engine.drift is None


def test_a_machine_lets_the_engine_compare() -> None:
    """The tokens are those of an engine that does not."""
    prompt = [5, 6, 7, 8]
    with open_llm("mixtral", seed=3) as plain, open_llm("mixtral", seed=3, machine="cpu2") as watched:
        expected, found = (llm.generate(prompt, GREEDY)[0].token_ids for llm in (plain, watched))
        assert found == expected
        drift = watched.engine.drift
        assert drift is not None
        assert drift.steps == watched.engine.metrics.steps
        assert drift.measured > 0
        assert drift.predicted > 0


def test_auto_runs_the_plan_that_the_search_finds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On two cores one rank has both of them, and nothing to exchange."""
    caplog.set_level(logging.INFO)
    with LLM(plan="auto", device="cpu", machine="cpu2", max_num_seqs=4) as llm:
        assert llm.engine.options.parallel == ParallelPlan()
        assert llm.generate("Once", SamplingParams(max_tokens=3, temperature=0))[0].token_ids
    assert "plan for cpu2" in caplog.text


def test_a_machine_is_assumed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(plan="auto", device="cpu", objective="tpot"):
        assert "no machine is named, so this one is taken for cpu2" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": "auto", "tensor_parallel_size": 2}, "plan='auto' chooses tensor_parallel_size itself"),
        ({"objective": "tpot"}, "objective say how to plan; give plan='auto' with them"),
        ({"plan": "auto", "objective": "speed"}, "objective='speed' is not one of throughput, tpot, ttft"),
        ({"machine": "none.json"}, "the machine 'none.json' is neither a file"),
        ({"machine": 3}, "machine=3 is neither the name of a machine nor a file"),
        ({"plan": "auto", "machine": "h200x8"}, "computes on cuda, this engine on cpu"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_engine({"device": "cpu", **options})
