"""SamplingState: random numbers that depend on seed and position only, counts, and ids the model does not have."""

from __future__ import annotations

import numpy as np
import pytest

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.sampling_state import SamplingState, TokenCounts
from flexmoe.errors import RequestError


def uniforms(seed: int, count: int) -> list[float]:
    state = SamplingState(SamplingParams(), seed)
    numbers = []
    for _ in range(count):
        numbers.append(state.uniform())
        state.accept(0)
    return numbers


def test_the_stream_is_splitmix64() -> None:
    """Reference values of SplitMix64 started at the mixed seed, from the published C code."""
    state = SamplingState(SamplingParams(), 0)
    assert state.uniform() == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    state.accept(5)
    assert state.uniform() == (0x6E789E6AA1B965F4 >> 11) * 2.0**-53


def test_asking_twice_gives_the_same_number() -> None:
    state = SamplingState(SamplingParams(), 7)
    assert state.uniform() == state.uniform()
    assert uniforms(7, 3)[0] == state.uniform()
    assert uniforms(-1, 3) == uniforms(2**64 - 1, 3)


def test_a_number_is_known_before_the_tokens_that_come_before_it() -> None:
    state = SamplingState(SamplingParams(), 7)
    early = [state.uniform(ahead) for ahead in range(4)]
    assert early == uniforms(7, 4)
    state.accept(5)
    assert [state.uniform(ahead) for ahead in range(3)] == early[1:]


def test_numbers_are_uniform_and_seeds_differ() -> None:
    numbers = np.array([uniforms(seed, 64) for seed in range(256)])
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = numbers.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 104  # chi-square, 63 degrees, p = 0.001
    assert len(np.unique(numbers)) == numbers.size
    assert abs(np.corrcoef(numbers)[0, 1:]).max() < 0.5
    assert 0 <= numbers.min() < numbers.max() < 1


def test_counts() -> None:
    counts = TokenCounts([5, 3, 5])
    for token in (3, 9, *range(100, 150), 9):
        counts.add(token)
    found = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
    assert found == {3: 1, 5: 0, 9: 2, **dict.fromkeys(range(100, 150), 1)}


def test_plain_greedy_changes_with_min_tokens() -> None:
    state = SamplingState(SamplingParams(temperature=0, min_tokens=2), 0, eos_token_ids=[2])
    seen = []
    for _ in range(3):
        seen.append((state.plain_greedy, state.suppressed_ids))
        state.accept(7)
    assert seen == [(False, (2,)), (False, (2,)), (True, ())]


def test_what_min_tokens_suppresses() -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=[9, 4])
    assert SamplingState(params, 0, eos_token_ids=[2]).suppressed_ids == (2, 4, 9)
    params = SamplingParams(min_tokens=1, stop_token_ids=[9], ignore_eos=True)
    assert SamplingState(params, 0, eos_token_ids=[2]).suppressed_ids == (9,)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0, "logprobs": 0}, False),
        ({"temperature": 0, "logit_bias": {1: 2.0}}, False),
        ({"temperature": 0, "presence_penalty": 0.5}, False),
        ({"temperature": 0, "min_tokens": 3}, True),  # nothing to suppress
        ({"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}, True),
    ],
)
def test_plain_greedy(options: dict[str, object], plain: bool) -> None:
    assert SamplingState(SamplingParams.from_options(options), 0, [1, 2]).plain_greedy is plain


@pytest.mark.parametrize(
    ("options", "ready"),
    [
        ({}, [True, True, True]),
        ({"temperature": 0}, [True, True, True]),
        ({"top_p": 0.5, "top_k": 3, "min_p": 0.1, "ignore_eos": True, "stop_token_ids": [4]}, [True, True, True]),
        ({"min_tokens": 2}, [False, False, True]),
        ({"min_tokens": 2, "ignore_eos": True}, [True, True, True]),
        ({"logprobs": 0}, [False, False, False]),
        ({"logit_bias": {1: 2.0}}, [False, False, False]),
        ({"repetition_penalty": 1.1}, [False, False, False]),
        ({"frequency_penalty": 0.1}, [False, False, False]),
    ],
)
def test_device_ready(options: dict[str, object], ready: list[bool]) -> None:
    state = SamplingState(SamplingParams.from_options(options), 0, [1, 2], eos_token_ids=[2])
    found = []
    for _ in ready:
        found.append(state.device_ready)
        state.accept(7)
    assert found == ready


def test_counts_are_kept_only_for_penalties() -> None:
    assert len(SamplingState(SamplingParams(), 0, [1, 2]).seen) == 0
    assert len(SamplingState(SamplingParams(repetition_penalty=1.1), 0, [1, 2]).seen) == 2


@pytest.mark.parametrize("options", [{"logit_bias": {100: 1.0}}, {"stop_token_ids": [-1]}])
def test_ids_beyond_the_vocabulary(options: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="this model has tokens 0 to 99"):
        SamplingState(SamplingParams.from_options(options), 0, vocab_size=100)
