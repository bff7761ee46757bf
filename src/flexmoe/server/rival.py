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

    def close(self) -> None:
        """End what belongs to it."""
        ...
