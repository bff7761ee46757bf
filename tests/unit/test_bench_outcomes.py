"""Figures of a serving benchmark, against hand-computed ones; and that outcomes always add up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.bench.endpoint import Answer, RequestFailed
from flexmoe.bench.outcomes import Outcome, Slo, result, spread


def outcome(number: int = 0, **changes: Any) -> Outcome:
    """Sent after 1 s, ended after 2 s; texts after 0.1, 0.3 and 0.4 s, three tokens."""
    values = {"sent": 1.0, "ended": 2.0, "texts": (0.1, 0.3, 0.4), "prompt_tokens": 10, "output_tokens": 3}
    return Outcome(number=number, **(values | changes))


def test_percentiles_lie_between_neighbours() -> None:
    # Of 0 .. 100 ms the p-th percentile is p; of 10 and 20 ms it is 10 + p/10.
    hundred = spread(value / 1e3 for value in range(101))
    assert hundred == {"mean": 50, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert spread([0.02, None, 0.01]) == {"mean": 15, "p50": 15, "p90": 19, "p95": 19.5, "p99": 19.9, "max": 20}
    assert spread([0.004]) == dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max"), 4)
    assert spread([]) is None
    assert spread([None]) is None


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_percentiles_are_in_order_and_within_the_samples(seconds: list[float]) -> None:
    found = spread(seconds)
    assert found is not None
    figures = [found[name] for name in ("p50", "p90", "p95", "p99", "max")]
    assert figures == sorted(figures)
    assert figures[0] >= round(1e3 * min(seconds), 3) - 1e-3
    assert figures[-1] == pytest.approx(1e3 * max(seconds), abs=1e-3)


def test_times_of_one_request() -> None:
    one = outcome()
    assert (one.ttft, one.e2e, one.tpot) == (0.1, 1.0, pytest.approx(0.15))
    assert one.itl == [pytest.approx(0.2), pytest.approx(0.1)]
    # Seven tokens in three pieces: the six after the first took 0.3 s.
    assert outcome(output_tokens=7).tpot == pytest.approx(0.05)
    assert outcome(output_tokens=None).tpot == pytest.approx(0.15)
    assert outcome(texts=(0.2,), output_tokens=1).tpot is None
    empty = outcome(texts=(), sent=None, ended=None)
    assert (empty.ttft, empty.tpot, empty.e2e, empty.itl) == (None, None, None, [])


def test_throughput_counts_from_the_first_sent_to_the_last_end() -> None:
    outcomes = [
        outcome(0),
        outcome(1, sent=0.5, ended=4.5, finish_reason="stop"),
        outcome(2, ended=1.5, error="HTTP 500", message="first"),
        outcome(3, ended=1.5, error="HTTP 500", message="second"),
        Outcome(number=4, error="not sent"),
    ]
    found = result(outcomes, Slo())
    assert (found["requests"], found["succeeded"], found["seconds"]) == (5, 2, 4.0)
    assert (found["requests_per_s"], found["output_tokens_per_s"], found["total_tokens_per_s"]) == (0.5, 1.5, 6.5)
    assert found["errors"] == {"HTTP 500": 2, "not sent": 1}
    assert found["error_messages"] == {"HTTP 500": "first", "not sent": None}
    assert found["e2e_ms"]["max"] == 4000
    assert "slo" not in found


def test_nothing_that_succeeded() -> None:
    found = result([Outcome(number=0, error="not sent")], Slo(ttft_ms=1))
    assert (found["requests_per_s"], found["ttft_ms"], found["tokens_counted_by"]) == (None, None, None)
    assert (found["within_slo"], found["goodput_requests_per_s"]) == (0, None)


@pytest.mark.parametrize(
    ("slo", "holds"),
    [
        (Slo(), True),
        (Slo(ttft_ms=100), True),
        (Slo(ttft_ms=99), False),
        (Slo(tpot_ms=151), True),
        (Slo(tpot_ms=149), False),
        (Slo(ttft_ms=99, tpot_ms=151), False),
    ],
)
def test_goodput(slo: Slo, holds: bool) -> None:
    assert slo.holds(outcome()) is holds
    assert not slo.holds(outcome(error="HTTP 429"))


@given(st.lists(st.sampled_from([None, "HTTP 429", "timeout", "not sent"]), max_size=30))
def test_outcomes_add_up(errors: list[str | None]) -> None:
    found = result([outcome(number, error=error) for number, error in enumerate(errors)], Slo(ttft_ms=1000))
    assert found["succeeded"] + sum(found["errors"].values()) == found["requests"] == len(errors)
    assert found["within_slo"] == found["succeeded"] == errors.count(None)


# ------------------------------------------------------------------ chunks of an answer


def taken(*events: bytes) -> Answer:
    answer = Answer()
    for moment, event in enumerate(events):
        answer.take(event, float(moment))
    return answer


def test_chunks_of_completions_and_chats() -> None:
    role = b'{"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}'
    thought = b'{"choices": [{"delta": {"reasoning_content": "hm"}}], "usage": null}'
    said = b'{"choices": [{"delta": {"content": "yes"}}]}'
    end = b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}'
    usage = b'{"choices": [], "usage": {"completion_tokens": 2}}'
    chat = taken(role, thought, said, end, usage, b"[DONE]")
    assert (chat.texts, chat.finish_reason, chat.usage) == ([1, 2], "stop", {"completion_tokens": 2})
    assert chat.is_done
    text = taken(b'{"choices": [{"text": "a"}]}', b'{"choices": [{"text": "", "finish_reason": "length"}]}')
    assert (text.texts, text.finish_reason, text.is_done) == ([0], "length", False)


def test_an_answer_without_any_text_begins_when_it_ends() -> None:
    assert taken(b'{"choices": [{"text": ""}]}', b'{"choices": [{"text": "", "finish_reason": "stop"}]}').texts == [1]


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b"", "bad answer"),
        (b"\xff", "bad answer"),
        (b"[1]", "bad answer"),
        (b"7", "bad answer"),
        (b'{"choices": ["a"]}', "bad answer"),
        (b'{"choices": 7}', "bad answer"),
        (b'{"choices": [{"delta": "a"}]}', "bad answer"),
        (b'{"usage": "much"}', "bad answer"),
        (b'{"error": {"message": "no"}}', "server error"),
        (b'{"error": "no"}', "server error"),
    ],
)
def test_what_is_no_chunk(event: bytes, kind: str) -> None:
    with pytest.raises(RequestFailed) as failure:
        taken(event)
    assert failure.value.kind == kind
