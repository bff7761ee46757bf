"""Serving: what an HTTP server adds to an engine's times, as clients see them. Enters: JSON. Leaves: seconds. No torch.

A request passes client, HTTP, validation and two threads before its prompt can be scheduled, and its first token comes
back the same way; both together count before. Later tokens come back beside the next steps. On a CPU what sends and
reads them takes processor time and the interpreter from whoever computes these, and so makes them longer. A GPU
computes on meanwhile: a step waits there only for sending that takes longer than itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexmoe.config.fields import number, required, six_digits
from flexmoe.errors import ConfigError, UnknownOptionError

_KEYS = ("request_us", "prompt_token_us", "streams_us")


@dataclass(frozen=True, slots=True)
class Serving:
    """Seconds beside an engine's.

    request_s: of a request until its first token has been read, beside what the engine takes for it; prompt_token_s:
    more for each token of the prompt. streams: what a step is longer from which so many streams get a token each, where
    nothing hides it, as (streams, seconds), fewest first.
    """

    request_s: float
    prompt_token_s: float = 0.0
    streams: tuple[tuple[int, float], ...] = ()

    def request(self, prompt_tokens: int) -> float:
        """Of one request."""
        return self.request_s + prompt_tokens * self.prompt_token_s

    def step(self, streams: float) -> float:
        """Of one step whose tokens so many streams get. On straight lines between those measured, and past the last."""
        if not self.streams or streams <= 0:
            return 0.0
        points = ((0, 0.0), *self.streams)
        above = next((at for at, (count, _) in enumerate(points) if count >= streams), len(points) - 1)
        (left, low), (right, high) = points[above - 1], points[above]
        return max(0.0, low + (high - low) * (streams - left) / (right - left))

    def longer(self, streams: float, seconds: float, *, beside: bool) -> float:
        """By how much a step of so many seconds is longer. beside: it is computed on a device of its own, on which the
        streams of the step before cost nothing until they take longer than the step.
        """
        sending = self.step(streams)
        return max(0.0, sending - seconds) if beside else sending

    def to_json(self) -> dict[str, Any]:
        """As a machine file has it."""
        return {
            "request_us": six_digits(self.request_s * 1e6),
            "prompt_token_us": six_digits(self.prompt_token_s * 1e6),
            "streams_us": [[count, six_digits(seconds * 1e6)] for count, seconds in self.streams],
        }

    @classmethod
    def from_json(cls, data: Any) -> Serving:
        """Raises ConfigError for what is none."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"the machine's serving is a JSON object, not {type(data).__name__}.")
        for key in data:
            if key not in _KEYS:
                raise UnknownOptionError(str(key), _KEYS, "a machine's serving")
        rows = required(data, "streams_us")
        if not isinstance(rows, list):
            raise ConfigError(f"streams_us={rows!r} is not a list of [streams, microseconds].")
        points = tuple(map(_point, rows))
        counts = [count for count, _ in points]
        if counts != sorted(set(counts)) or any(count < 1 for count in counts):
            raise ConfigError(f"streams_us has the numbers of streams {counts}; use ascending ones from 1.")
        return cls(number(data, "request_us") / 1e6, number(data, "prompt_token_us", 0) / 1e6, points)


def _point(row: Any) -> tuple[int, float]:
    match row:
        case [int(count), (int() | float()) as us] if us >= 0:
            return count, us / 1e6
    raise ConfigError(f"{row!r} is no cost of streams; one is [streams, microseconds that a step is longer].")
