"""A conversation that fits the model's context. Enters: turns. Leaves: messages, and the token ids of a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from flexmoe.errors import RequestError

Message = dict[str, str]


class Conversation:
    """Instructions and turns, the latest last. A turn is a question and, once there is one, its answer."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[list[str]] = []

    def __len__(self) -> int:
        """Number of turns."""
        return len(self._turns)

    @property
    def messages(self) -> list[Message]:
        """As chat templates and OpenAI's API take them."""
        start: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        roles = ("user", "assistant")
        return start + [
            {"role": role, "content": text}
            for turn in self._turns
            for role, text in zip(roles, turn, strict=False)  # the last turn may wait for its answer
        ]

    def ask(self, text: str) -> None:
        """Begin a turn."""
        self._turns.append([text])

    def answer(self, text: str) -> None:
        """End the turn begun last."""
        self._turns[-1].append(text)

    def take_back(self) -> str | None:
        """Remove the last turn and return its question; None if there is none."""
        return self._turns.pop()[0] if self._turns else None

    def reset(self) -> None:
        """Forget all turns; the instructions stay."""
        self._turns.clear()

    def save(self, path: Path) -> None:
        """Write the messages as JSON. Raises RequestError if the file cannot be written."""
        try:
            path.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}.") from error

    def fit(self, encode: Callable[[Sequence[Message]], list[int]], context: int, answer: int) -> tuple[list[int], int]:
        """Token ids of the prompt, and how many of the oldest turns were dropped to make room for an answer.

        context: tokens the model can hold. answer: tokens wanted for the answer; a single turn may leave it fewer.
        Raises RequestError, with all turns kept, if the last question alone fills the context.
        """
        before = list(self._turns)
        ids = encode(self.messages)
        while len(ids) + answer > context and len(self._turns) > 1:
            del self._turns[0]
            ids = encode(self.messages)
        dropped = len(before) - len(self._turns)
        if len(ids) >= context:
            self._turns = before
            raise RequestError(
                f"the message makes a prompt of {len(ids)} tokens, which fills the context of {context}; shorten it."
            )
        return ids, dropped
