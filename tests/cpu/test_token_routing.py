"""The experts behind each token: the same from every path through the model, and for whom asked only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flexmoe import LLM, SamplingParams
from flexmoe.engine.outputs import TokenRouting
from flexmoe.errors import RequestError

PROMPT = "Once upon a time there was a"
COUNT, TOLD = 10, 6


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", num_blocks=64, threads=1) as llm:
        yield llm


def greedy(llm: LLM, tokens: list[int], count: int, told: int) -> tuple[list[int], tuple[TokenRouting, ...]]:
    out = llm.generate([tokens], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, routing=told))[0]
    assert out.outputs[0].routing is not None
    return list(out.token_ids), out.outputs[0].routing


def test_each_token_has_the_experts_of_the_row_that_chose_it(llm: LLM) -> None:
    prompt = llm.encode(PROMPT)
    answer, routing = greedy(llm, prompt, COUNT, TOLD)
    assert len(routing) == TOLD
    for place, found in enumerate(routing):  # the same, from a prompt that ends there: another path through the model
        token, (expected,) = greedy(llm, prompt + answer[:place], 1, 1)
        assert token == [answer[place]]
        assert found.layers == expected.layers
        assert found.experts == expected.experts
        for weights, others in zip(found.weights, expected.weights, strict=True):
            assert weights == pytest.approx(others, abs=1e-4)
            assert sum(weights) == pytest.approx(1, abs=1e-4)


def test_it_changes_no_token_and_is_told_to_nobody_else(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=COUNT)
    told = SamplingParams(temperature=0, max_tokens=COUNT, routing=COUNT)
    alone = llm.generate(PROMPT, plain)[0]
    first, second = llm.generate([PROMPT, PROMPT], [plain, told])
    assert first.token_ids == second.token_ids == alone.token_ids
    assert first.outputs[0].routing is None
    assert second.outputs[0].routing is not None
    assert len(second.outputs[0].routing) == len(second.token_ids)


def test_counting_sees_what_is_told(llm: LLM) -> None:
    with llm.record_routing() as recorder:
        _, routing = greedy(llm, llm.encode("A word"), 4, 4)
    loads = {load.layer: load for load in recorder.loads()}
    assert sorted(loads) == list(routing[0].layers)
    for place, layer in enumerate(routing[0].layers):
        for token in routing:
            assert all(loads[layer].counts[expert] > 0 for expert in token.experts[place])


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(RequestError, match="routing=-1 is not an integer of at least 0"):
        SamplingParams(routing=-1)
