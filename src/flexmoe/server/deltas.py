"""What is new since the last look. Enters: outputs, each with the whole answer so far. Leaves: their growth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexmoe.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs, TokenRouting


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one choice. logprobs, routing: of the tokens since the last delta; None if not asked for.

    num_routed: tokens whose routing was told before.
    """

    choice: int
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    routing: tuple[TokenRouting, ...] | None
    num_routed: int
    sample: CompletionOutput
    first: bool


class Deltas:
    """Remembers of each choice how much was told."""

    def __init__(self, num_samples: int) -> None:
        """num_samples: of each prompt; choices are numbered through all prompts."""
        self._num_samples = num_samples
        self._told: dict[int, tuple[int, int, int]] = {}  # by choice: characters, log-probabilities, routings
        self._over: set[int] = set()

    def of(self, place: int, output: RequestOutput) -> Iterator[Delta]:
        """The growth of prompt number `place`: of each sample that has new text, or has ended."""
        for sample in output.outputs:
            choice = place * self._num_samples + sample.index
            first = choice not in self._told
            text, logprobs, routed = self._told.get(choice, (0, 0, 0))
            if choice in self._over or (len(sample.text) == text and not sample.finished):
                continue
            new = None if sample.logprobs is None else sample.logprobs[logprobs:]
            routing = None if sample.routing is None else sample.routing[routed:]
            self._told[choice] = len(sample.text), len(sample.logprobs or ()), len(sample.routing or ())
            if sample.finished:
                self._over.add(choice)
            yield Delta(choice, sample.text[text:], new, routing, routed, sample, first)
