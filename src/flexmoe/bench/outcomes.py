"""What became of requests to a server. Enters: an Outcome each. Leaves: percentiles, throughput, goodput, errors.

Every request has an Outcome, and those of a row add up: succeeded + all errors = requests. Times are of those that
succeeded. TTFT: from sending until the first text. ITL: gaps between texts as they come. TPOT: from the first text to
the last, over the tokens after the first. Throughput counts from the first request sent to the last answer's end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]

PERCENTILES = (50, 90, 95, 99)

NOT_SENT, INTERRUPTED = "not sent", "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request. due, sent, ended: seconds after the start of the run; due: when it should have been sent.

    late: seconds for which this program kept it. queued: for which it then waited for one of `concurrency` places; both
    None in a closed loop. texts: when each piece of text came, in seconds after it was sent. Tokens: None if the server
    did not count.
    error: its kind, None for an answer that is complete. message: what was said.
    """

    number: int
    due: float | None = None
    late: float | None = None
    queued: float | None = None
    sent: float | None = None
    ended: float | None = None
    texts: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    message: str | None = None

    @property
    def tokens(self) -> int:
        """Of the answer; pieces of text where the server did not count."""
        return len(self.texts) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float | None:
        return self.texts[0] if self.texts else None

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token, or of one piece."""
        if len(self.texts) < 2 or self.tokens < 2:
            return None
        return (self.texts[-1] - self.texts[0]) / (self.tokens - 1)

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def e2e(self) -> float | None:
        return None if self.sent is None or self.ended is None else self.ended - self.sent

    def line(self) -> Row:
        """All of it, times in seconds, for a file of requests."""
        figures = {"ttft": _rounded(self.ttft), "tpot": _rounded(self.tpot), "e2e": _rounded(self.e2e)}
        values = {name: _rounded(value) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return values | {"texts": [_rounded(moment) for moment in self.texts]} | figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a good answer keeps, in milliseconds; None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __bool__(self) -> bool:
        return self != Slo()

    def holds(self, outcome: Outcome) -> bool:
        """False for a request that failed."""
        return outcome.error is None and _keeps(outcome.ttft, self.ttft_ms) and _keeps(outcome.tpot, self.tpot_ms)


def result(outcomes: Sequence[Outcome], slo: Slo) -> Row:
    """The `result` of a row."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    seconds = _seconds(outcomes)
    tokens = sum(outcome.tokens for outcome in good)
    prompts = [outcome.prompt_tokens for outcome in good if outcome.prompt_tokens is not None]
    counted = len(prompts) == len(good)
    return {
        "requests": len(outcomes),
        "succeeded": len(good),
        "seconds": _rounded(seconds),
        "requests_per_s": _rate(len(good), seconds),
        "output_tokens_per_s": _rate(tokens, seconds),
        "total_tokens_per_s": _rate(tokens + sum(prompts), seconds) if counted else None,
        "prompt_tokens": sum(prompts) if counted else None,
        "cached_tokens": sum(outcome.cached_tokens or 0 for outcome in good),
        "output_tokens": tokens,
        "tokens_counted_by": _counted_by(good),
        **_goodput(outcomes, slo, seconds),
        **_times(good),
        "queued_ms": spread(outcome.queued for outcome in outcomes),
        "finish_reasons": dict(Counter(outcome.finish_reason for outcome in good)),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        "error_messages": {outcome.error: outcome.message for outcome in reversed(outcomes) if outcome.error},
    }


def spread(seconds: Iterable[float | None]) -> Row | None:
    """Mean, percentiles (linear between neighbours) and the largest, in milliseconds; None of nothing."""
    samples = [1e3 * value for value in seconds if value is not None]
    if not samples:
        return None
    figures = dict(zip((f"p{p}" for p in PERCENTILES), np.percentile(samples, PERCENTILES), strict=True))
    named = {"mean": np.mean(samples), **figures, "max": max(samples)}
    return {name: round(float(value), 3) for name, value in named.items()}


def _times(good: Sequence[Outcome]) -> Row:
    return {
        "ttft_ms": spread(outcome.ttft for outcome in good),
        "itl_ms": spread(gap for outcome in good for gap in outcome.itl),
        "tpot_ms": spread(outcome.tpot for outcome in good),
        "e2e_ms": spread(outcome.e2e for outcome in good),
    }


def _goodput(outcomes: Sequence[Outcome], slo: Slo, seconds: float) -> Row:
    if not slo:
        return {}
    kept = sum(map(slo.holds, outcomes))
    return {"slo": asdict(slo), "within_slo": kept, "goodput_requests_per_s": _rate(kept, seconds)}


def _counted_by(good: Sequence[Outcome]) -> str | None:
    """Who counted tokens: the server ("usage"), or this program by pieces of text; "both" if it was now so, now so."""
    ways = {"chunks" if outcome.output_tokens is None else "usage" for outcome in good}
    return ("both" if len(ways) == 2 else ways.pop()) if ways else None


def _seconds(outcomes: Sequence[Outcome]) -> float:
    sent = [outcome.sent for outcome in outcomes if outcome.sent is not None]
    ended = [outcome.ended for outcome in outcomes if outcome.ended is not None]
    return max(ended) - min(sent) if sent and ended else 0.0


def _keeps(seconds: float | None, limit_ms: float | None) -> bool:
    return limit_ms is None or seconds is None or 1e3 * seconds <= limit_ms


def _rate(count: float, seconds: float) -> float | None:
    return round(count / seconds, 4) if seconds else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
