"""From a recording to a balanced plan on ranks: the same tokens, the same counts, and less to do for the busiest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexmoe import LLM, SamplingParams
from flexmoe.config.routing import read_recording
from flexmoe.errors import EngineError, RankError, RequestError
from flexmoe.planner.balance import balanced_plan
from tests.cpu.tiny_models import tiny
from tests.multi.pool import Pool

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "threads": 1, "max_model_len": 64, "num_blocks": 40, "block_size": 4,
    "max_num_batched_tokens": 16, "expert_backend": "reference", "enable_prefix_caching": False,
}  # fmt: skip
PROMPTS = [[7, 30, 31, 99, 5, 5, 200, 11], [*range(20, 49)], [9], [3, 4]]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(("size", "dispatch"), [(2, "all_reduce"), (2, "all_to_all"), (4, "all_reduce")])
def test_a_balanced_plan(pools: dict[int, Pool], tmp_path: Path, case: str, size: int, dispatch: str) -> None:
    """With replicas: tokens are one process's, and so is the recording that the ranks make in turn."""
    alone, plan = tmp_path / "alone.jsonl", tmp_path / "plan.json"
    with LLM(tiny(case), **OPTIONS) as llm, llm.record_routing(alone):
        wanted = tokens(llm)
    loads = read_recording(alone)
    balanced_plan(loads, size, spare_slots=1, moe_dispatch=dispatch).write(plan)
    with pools[size].llm(tiny(case), **OPTIONS, plan=plan) as llm:
        placements = llm.engine.options.parallel.placements
        assert all(sum(map(len, placed.slots)) > placed.num_experts for placed in placements.values())
        with llm.record_routing(tmp_path / "ranks.jsonl") as recorder:
            assert tokens(llm) == wanted
            assert recorder.loads() == loads
        assert tokens(llm) == wanted
    assert read_recording(tmp_path / "ranks.jsonl") == recorder.loads() == loads


def test_ranks_refuse_a_second_recording(pools: dict[int, Pool]) -> None:
    options = {**OPTIONS, "tensor_parallel_size": 2}
    with pools[2].llm(tiny("mixtral"), **options) as llm:
        with llm.record_routing() as recorder:
            with pytest.raises(EngineError, match="looks into the steps already") as error, llm.record_routing():
                pass
            assert not isinstance(error.value, RankError)
            tokens(llm)
            assert recorder.loads()[0].tokens > 0
        with llm.record_routing() as recorder:
            assert recorder.loads()[0].tokens == 0


def test_the_death_of_a_rank_is_told_through_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"

    def record(llm: LLM) -> None:
        with llm.record_routing(path):
            tokens(llm)
            llm.engine.runner.ranks.members[1].process.kill()  # type: ignore[union-attr]
            tokens(llm)

    with LLM(tiny("mixtral"), **OPTIONS, tensor_parallel_size=2) as llm, pytest.raises(RankError, match="rank 1 of 2"):
        record(llm)
    assert path.read_text() == ""


@pytest.mark.parametrize("dispatch", ["all_reduce", "all_to_all"])
@pytest.mark.parametrize("shared", ["tensor_parallel_size", "data_parallel_size"])
def test_ranks_tell_the_experts_behind_tokens(pools: dict[int, Pool], dispatch: str, shared: str) -> None:
    """As one process does, whatever rank computes the experts."""
    told = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, routing=4)
    with LLM(tiny("mixtral"), **OPTIONS) as llm:
        wanted = [output.outputs[0].routing for output in llm.generate(PROMPTS, told)]
    options = {**OPTIONS, shared: 2, "expert_parallel_size": 2, "moe_dispatch": dispatch}
    with pools[2].llm(tiny("mixtral"), **options) as llm:
        found = [output.outputs[0].routing for output in llm.generate(PROMPTS, told)]
    assert [len(routing or ()) for routing in found] == [4] * len(PROMPTS)
    for ours, theirs in zip(found, wanted, strict=True):
        assert [token.experts for token in ours or ()] == [token.experts for token in theirs or ()]


def test_stages_refuse_it(pools: dict[int, Pool]) -> None:
    with (
        pools[2].llm(tiny("mixtral"), **OPTIONS, pipeline_parallel_size=2) as llm,
        pytest.raises(RequestError, match="use pipeline_parallel_size=1"),
    ):
        llm.generate(PROMPTS, SamplingParams(routing=1))
