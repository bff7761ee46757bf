"""Steps that are sent to ranks before the tokens of the step before are known: every token is that of one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from flexmoe import LLM, SamplingParams
from flexmoe.engine import ranks
from flexmoe.engine.ranks import RankedRunner
from tests.cpu.tiny_models import tiny
from tests.multi.test_models import OPTIONS, PLANS, PROMPTS

DATA = {"data_parallel_size": 2, "expert_parallel_size": 2}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MIXED = [
    SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
    SamplingParams(temperature=0, stop=["e"], max_tokens=12),
    SamplingParams(temperature=0.7, n=2, seed=1, max_tokens=9),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
]
ON_HOST = SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=1, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=[PLANS["expert-2"], DATA], ids=["expert", "data"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_MODULE", "tests.multi.ahead_ranks")
        with LLM(tiny("qwen2_moe"), **OPTIONS, **request.param) as made:
            yield made


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each launch whether the tokens before it were unknown."""
    found: list[bool] = []
    launch = RankedRunner.launch

    def watched(self: RankedRunner, *args: Any, after: Any = None) -> Any:
        found.append(after is not None)
        return launch(self, *args, after=after)

    monkeypatch.setattr(RankedRunner, "launch", watched)
    return found


@pytest.mark.parametrize("params", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_tokens_are_those_of_one_process(llm: LLM, ahead: list[bool], params: Any) -> None:
    with LLM(tiny("qwen2_moe"), **OPTIONS) as one:
        expected = [[o.token_ids for o in output.outputs] for output in one.generate(PROMPTS, params)]
    found = [[o.token_ids for o in output.outputs] for output in llm.generate(PROMPTS, params)]
    assert found == expected
    assert sum(ahead) > 5


def test_what_the_host_samples_is_waited_for(llm: LLM, ahead: list[bool]) -> None:
    with LLM(tiny("qwen2_moe"), **OPTIONS) as one:
        expected = [output.token_ids for output in one.generate(PROMPTS, ON_HOST)]
    assert [output.token_ids for output in llm.generate(PROMPTS, ON_HOST)] == expected
    assert not any(ahead)


def test_a_step_that_is_given_up_does_no_harm(llm: LLM, ahead: list[bool]) -> None:
    whole = llm.generate(PROMPTS[1], GREEDY)[0].token_ids
    stream = llm.stream(PROMPTS[1], GREEDY)
    for _ in range(4):
        next(stream)
    stream.close()
    assert llm.generate(PROMPTS[1], GREEDY)[0].token_ids == whole
    assert any(ahead)


def test_requests_come_and_go_while_steps_are_ahead(llm: LLM, ahead: list[bool]) -> None:
    """So that of two data ranks one idles, decodes or has a prompt while the other decodes."""
    with LLM(tiny("qwen2_moe"), **OPTIONS) as one:
        expected = [output.token_ids for output in one.generate(PROMPTS, GREEDY)]
    engine, names, found = llm.engine, list[str](), dict[str, tuple[int, ...]]()
    for number in itertools.count():
        if number % 5 == 0 and len(names) < len(PROMPTS):
            names.append(engine.add_request(PROMPTS[len(names)], GREEDY))
        found |= {output.request_id: output.token_ids for output in engine.step()}
        engine.scheduler.check_integrity()
        if len(found) == len(PROMPTS):
            break
    assert [found[name] for name in names] == expected
    assert sum(ahead) > 5


def test_ranks_are_asked_while_a_step_is_on_its_way(llm: LLM, ahead: list[bool]) -> None:
    """Which is still waited for: its tokens are there, and no answer is taken for another's."""
    engine = llm.engine
    whole = llm.generate(PROMPTS[1], GREEDY)[0].token_ids
    engine.add_request(PROMPTS[1], GREEDY)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
        engine.count_experts(True)
        assert isinstance(engine.runner, RankedRunner)
        assert len(engine.runner.traffic()) == 2
        engine.expert_loads()
        engine.count_experts(False)
    assert [output.token_ids for output in outputs] == [whole]
    assert sum(ahead) > 5


def test_experts_are_counted_from_the_next_launch_on(llm: LLM, ahead: list[bool]) -> None:
    engine = llm.engine
    engine.add_request(PROMPTS[1], GREEDY)
    while not any(ahead):
        engine.step()
    engine.count_experts(True)
    rest = 0
    while engine.has_unfinished:
        rest += 1
        engine.step()
    load = engine.expert_loads()[0]
    engine.count_experts(False)
    assert load.passes == rest - 1  # all but the one that was on its way
    assert sum(load.counts) == load.tokens * load.top_k
