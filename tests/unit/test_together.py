"""What data ranks are told of each other: rows, how far these look back, how tokens are chosen; who takes a graph."""

from __future__ import annotations

import pytest

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.engine.together import DecodeTraits, Together
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk, Step

GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(temperature=0.7)
FILTERED = SamplingParams(temperature=0.7, top_p=0.9)
ON_HOST = SamplingParams(temperature=0.7, top_k=5, logprobs=1)


def decodes(*starts: int) -> Step:
    chunks = [ScheduledChunk(request(start + 1), start, 1, True) for start in starts]
    return Step(chunks, len(chunks), [])


def request(tokens: int) -> Request:
    return Request("r", [1] * tokens, GREEDY, eos_token_ids=(), max_total_tokens=10_000)


def states(*params: SamplingParams) -> list[SamplingState]:
    return [SamplingState(each, seed) for seed, each in enumerate(params)]


def traits(step: Step, *params: SamplingParams) -> DecodeTraits:
    return DecodeTraits.of(step.chunks, states(*params))


def test_traits_of_one_data_rank() -> None:
    assert traits(decodes(4, 90), GREEDY, GREEDY) == DecodeTraits(2, 90, False, False, False)
    assert traits(decodes(4, 90), GREEDY, DRAWN) == DecodeTraits(2, 90, True, False, False)
    assert traits(decodes(4), FILTERED) == DecodeTraits(1, 4, True, True, False)
    assert traits(decodes(4, 90), FILTERED, ON_HOST) == DecodeTraits(2, 90, False, False, True), "all on the host"
    assert traits(decodes()) == DecodeTraits(0, 0, False, False, False)


def test_parts_have_in_common_what_any_of_them_has() -> None:
    parts = [decodes(7), decodes(), decodes(3, 2000)]
    found = Together.of(parts, [states(FILTERED), [], states(GREEDY, DRAWN)])
    assert found == Together(2, DecodeTraits(2, 2000, True, True, False))
    found = Together.of(parts, [states(ON_HOST), [], states(GREEDY, GREEDY)])
    assert found == Together(2, DecodeTraits(2, 2000, False, False, True))


@pytest.mark.parametrize("prompt_first", [True, False])
def test_a_prompt_anywhere_makes_the_step_one_of_prompts(prompt_first: bool) -> None:
    prompt = Step([ScheduledChunk(request(9), 0, 9, True)], 0, [])
    parts = [prompt, decodes(3)] if prompt_first else [decodes(3), prompt]
    assert Together.of(parts, [states(GREEDY), states(GREEDY)]) == Together(9, None)


def test_whoever_wants_the_routing_takes_no_graph() -> None:
    wanted = SamplingParams(temperature=0, routing=1)
    assert Together.of([decodes(3), decodes(4)], [states(GREEDY), states(wanted)]) == Together(1, None)
