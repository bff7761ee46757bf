"""Request: what it refuses, what it counts, and each way in which a token ends it."""

from __future__ import annotations

from typing import Any

import pytest

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError
from flexmoe.scheduling import Request, RequestStatus

EOS = 9


def request(prompt: int = 3, max_total_tokens: int = 100, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": None, **sampling})
    return Request("a", range(prompt), params, eos_token_ids=(EOS, 10), max_total_tokens=max_total_tokens)


def feed(target: Request, *tokens: int) -> Request:
    for token in tokens:
        assert target.status is not RequestStatus.FINISHED, "tokens were appended after the end"
        target.append(token)
    return target


def test_a_new_request_waits_with_nothing_computed() -> None:
    new = request(prompt=3)
    assert (new.status, new.finish_reason, new.stop_reason) == (RequestStatus.WAITING, None, None)
    assert (new.num_tokens, new.num_prompt_tokens, new.num_output_tokens, new.output_token_ids) == (3, 3, 0, [])
    assert (new.num_computed_tokens, new.num_cached_tokens, new.blocks, new.num_preemptions) == (0, 0, [], 0)
    assert "'a', waiting" in repr(new)


def test_the_prompt_is_copied() -> None:
    prompt = [1, 2]
    own = Request("a", prompt, SamplingParams(), eos_token_ids=(), max_total_tokens=10)
    own.append(3)
    assert (prompt, own.token_ids, own.output_token_ids) == ([1, 2], [1, 2, 3], [3])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [(0, ["prompt of 0 tokens"]), (8, ["prompt of 8 tokens", "hold 8 together", "at most 7"]), (9, ["9", "at most 7"])],
)
def test_a_prompt_without_room_is_refused(prompt: int, words: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        request(prompt=prompt, max_total_tokens=8)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason", "stop_reason"),
    [
        ({}, [1, EOS], "stop", None),
        ({}, [1, 10], "stop", None),
        ({"stop_token_ids": [4]}, [1, 4], "stop", 4),
        ({"stop_token_ids": [EOS]}, [EOS], "stop", None),  # both: the model's own end comes first
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [10, EOS], "stop", EOS),
        ({"max_tokens": 2}, [1, 1], "length", None),
        ({"max_tokens": 2}, [1, EOS], "stop", None),
        ({"max_tokens": 2, "ignore_eos": True}, [1, EOS], "length", None),
        ({"min_tokens": 3}, [EOS, EOS, EOS], "stop", None),
        ({"min_tokens": 2, "stop_token_ids": [4]}, [4, 4], "stop", 4),
        ({"min_tokens": 2, "max_tokens": 2}, [EOS, 1], "length", None),
    ],
)
def test_token_level_stops(sampling: dict[str, Any], tokens: list[int], reason: str, stop_reason: int | None) -> None:
    done = feed(request(**sampling), *tokens)
    assert (done.status, done.finish_reason, done.stop_reason) == (RequestStatus.FINISHED, reason, stop_reason)
    assert done.output_token_ids == tokens


def test_the_total_length_ends_a_request_even_below_min_tokens() -> None:
    done = feed(request(prompt=3, max_total_tokens=5, min_tokens=4, max_tokens=6), EOS, EOS)
    assert (done.finish_reason, done.num_tokens, done.token_limit) == ("length", 5, 5)


def test_the_token_limit_is_the_nearer_of_both_limits() -> None:
    assert request(prompt=3, max_tokens=4).token_limit == 7
    assert request(prompt=3, max_tokens=98).token_limit == 100
    assert request(prompt=3).token_limit == 100
