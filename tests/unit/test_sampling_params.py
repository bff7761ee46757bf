"""SamplingParams: every range at both ends, values made uniform, options refused by name, what they say of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError, UnknownOptionError

NUMBERS = {  # lowest allowed, highest allowed, a little below, a little above
    "temperature": (0.0, 100.0, -1e-9, 100.001),
    "top_p": (1e-9, 1.0, 0.0, 1.0001),
    "min_p": (0.0, 1.0, -1e-9, 1.0001),
    "repetition_penalty": (1e-9, 100.0, 0.0, 100.001),
    "presence_penalty": (-2.0, 2.0, -2.001, 2.001),
    "frequency_penalty": (-2.0, 2.0, -2.001, 2.001),
}
INTEGERS: dict[str, tuple[int, int | None]] = {
    "n": (1, 128),
    "top_k": (-1, None),
    "min_tokens": (0, None),
    "max_tokens": (1, None),
    "logprobs": (0, 20),
    "seed": (-(2**63), 2**63 - 1),
}
NOT_NUMBERS = [float("nan"), float("inf"), float("-inf"), 10**400, True, "1", None, [1]]
NOT_INTEGERS = [1.0, True, "1", [1]]


def refusal(**options: Any) -> str:
    """What SamplingParams says when it refuses."""
    with pytest.raises(RequestError) as error:
        SamplingParams(**options)
    return str(error.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_accepted_to_the_ends_of_its_range_and_no_further(name: str) -> None:
    low, high, below, above = NUMBERS[name]
    assert getattr(SamplingParams(**{name: low}), name) == low
    assert getattr(SamplingParams(**{name: high}), name) == high
    assert refusal(**{name: below}).startswith(f"{name}={below:g}")
    assert f"to {high:g}" in refusal(**{name: above})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_no_number_is_refused(name: str, value: object) -> None:
    assert refusal(**{name: value}).startswith(f"{name}={value!r} is not a number from ")


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_is_accepted_to_the_ends_of_its_range_and_no_further(name: str) -> None:
    low, high = INTEGERS[name]
    for value in (low, 10**9 if high is None else high):
        assert getattr(SamplingParams(**{"max_tokens": None, name: value}), name) == value
    span = f"of at least {low}" if high is None else f"from {low} to {high}"
    assert refusal(**{name: low - 1}) == f"{name}={low - 1} is not an integer {span}."
    if high is not None:
        assert refusal(**{name: high + 1}) == f"{name}={high + 1} is not an integer {span}."


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", NOT_INTEGERS)
def test_what_is_no_integer_is_refused(name: str, value: object) -> None:
    assert refusal(**{name: value}).startswith(f"{name}={value!r} is not an integer ")


def test_none_means_no_limit_no_seed_no_logprobs() -> None:
    params = SamplingParams(max_tokens=None, seed=None, logprobs=None)
    assert (params.max_tokens, params.seed, params.logprobs) == (None, None, None)


def test_stops_become_tuples() -> None:
    params = SamplingParams(stop="end", stop_token_ids=7)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("end",), (7,))
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))
    params = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), {})


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "ignore_eos", "skip_special_tokens"])
def test_a_flag_is_true_or_false(name: str) -> None:
    assert refusal(**{name: "false"}) == f"{name}='false' is neither True nor False."
    assert [getattr(SamplingParams(**{name: value}), name) for value in (True, False)] == [True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": [1]}, "stop=[1] is not a str or a list of str."),
        ({"stop": 5}, "stop=5 is not a str or a list of str."),
        ({"stop": ["a", ""]}, "empty string"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids=['1'] is not a int or a list of int."),
        ({"stop_token_ids": [True]}, "stop_token_ids=[True]"),
        ({"stop_token_ids": True}, "stop_token_ids="),
        ({"logit_bias": [(1, 2.0)]}, "logit_bias=[(1, 2.0)] is not a mapping from token id to a number."),
        ({"logit_bias": {"word": 1.0}}, "logit_bias={'word': 1.0} is not a mapping from token id to a number."),
        ({"logit_bias": {1.5: 1.0}}, "logit_bias={1.5: 1.0} is not"),
        ({"logit_bias": {1: "much"}}, "logit_bias={1: 'much'} is not"),
        ({"logit_bias": {1: 10**400}}, "logit_bias={1: 1000"),
        ({"logit_bias": {1: None}}, "logit_bias={1: None} is not"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias[1]=nan is not a number from -1e+09 to 1e+09."),
        ({"logit_bias": {1: 2e9}}, "logit_bias[1]=2000000000.0 is not"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is above max_tokens=8"),
        ({"temperature": 0, "n": 2}, "n=2 with temperature=0 would give 2 identical samples"),
        ({"top_p": 0}, "top_p=0 keeps no token"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 divides by zero"),
    ],
)
def test_refusals_say_what_was_wrong(options: dict[str, Any], words: str) -> None:
    assert words in refusal(**options)


def test_logit_bias_takes_the_ids_of_json() -> None:
    assert SamplingParams(logit_bias={"50256": -100}).logit_bias == {50256: -100.0}  # type: ignore[dict-item]


def test_min_tokens_may_equal_max_tokens_or_stand_alone() -> None:
    assert SamplingParams(min_tokens=8, max_tokens=8).min_tokens == 8
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


def test_an_unknown_option_names_the_nearest_known_one() -> None:
    with pytest.raises(UnknownOptionError, match="has no option 'temprature'; did you mean 'temperature'"):
        SamplingParams.from_options({"temprature": 1.0})
    with pytest.raises(UnknownOptionError, match="known options: frequency_penalty, ignore_eos, "):
        SamplingParams.from_options({"zzz": 1})
    assert SamplingParams.from_options({"top_k": 3, "n": 2}) == SamplingParams(top_k=3, n=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -0.1),
        ("logit_bias", {1: 1.0}),
        ("min_tokens", 1),
    ],
)
def test_what_changes_logits(name: str, value: Any) -> None:
    assert SamplingParams(**{name: value}).changes_logits
    assert not SamplingParams(**{"temperature": 0, name: value}).plain_greedy


def test_what_does_not_change_logits() -> None:
    assert not SamplingParams(top_k=5, top_p=0.5, min_p=0.5, logprobs=3, stop="x", temperature=0.3).changes_logits


def test_greedy_is_temperature_0_exactly() -> None:
    assert [SamplingParams(temperature=t).greedy for t in (0, 0.0, 1e-9, 1)] == [True, True, False, False]
    assert [SamplingParams(temperature=t, top_k=3).plain_greedy for t in (0, 1)] == [True, False]
    assert not SamplingParams(temperature=0, logprobs=0).plain_greedy


def test_values_are_frozen_and_defaults_are_not_shared() -> None:
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    bias = {1: 1.0}
    biased = SamplingParams(logit_bias=bias)
    bias[2] = 5.0
    assert biased.logit_bias == {1: 1.0}
