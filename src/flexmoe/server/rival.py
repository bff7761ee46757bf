"""Rival: the engine that the page compares ours with. Enters: the tokens of a prompt. Leaves: events of its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Question:
    """What both engines are asked, greedily. token_ids: the same conversation, as our model's prompt."""

    messages: Sequence[Mapping[str, Any]]
    token_ids: Sequence[int]
    max_tokens: int
    ignore_eos: bool


@dataclass(slots=True)
class Times:
    """When tokens came, in seconds of `time.monotonic()`."""

    start: float
    first: float | None = None
    last: float | None = None

    def token(self, now: float) -> None:
        """One came."""
        self.first, self.last = now if self.first is None else self.first, now

    def told(self, count: int) -> dict[str, float | None]:
        """Seconds to the first of `count` tokens, and a token after it."""
        if self.first is None or self.last is None:
            return {"ttft": None, "tpot": None}
        tpot = (self.last - self.first) / (count - 1) if count > 1 else None
        return {"ttft": self.first - self.start, "tpot": tpot}


class Rival(Protocol):
    """Another engine."""

    def about(self) -> dict[str, str]:
        """Its kind and its name."""
        ...

    def answer(self, question: Question) -> AsyncIterator[bytes]:
        """Server-sent events: `status` while it is made ready, then chunks as chat completions have them.

        Ending the iterator early ends the work. Raises APIError for what went wrong.
        """
        ...

    async def close(self) -> None:
        """End what belongs to it."""
        ...
