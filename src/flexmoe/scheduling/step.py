"""Step: what one forward pass computes. The scheduler chooses it, the engine's runner computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Compute request.token_ids[start : start + num_tokens].

    samples: the chunk reaches the request's last token, whose logits yield a new one.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool


@dataclass(slots=True)
class Step:
    """What one forward pass computes.

    chunks: first num_decodes chunks of one token each (all earlier tokens are computed), then prefills.
    preempted: requests that lost their blocks to others just now.
    """

    chunks: Sequence[ScheduledChunk]
    num_decodes: int
    preempted: list[Request]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_samples(self) -> int:
        """Tokens that update() expects."""
        return sum([chunk.samples for chunk in self.chunks])
