"""What sets decode steps apart, and what data ranks do alike. Enters: chunks and sampling states. Leaves: plain data.

Data ranks have rows of their own, but gather them in every MoE layer: so their passes, and the shapes of these, have to
be the same. Whoever schedules knows all of them, and says with each step what they have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from flexmoe.engine.sampling_state import SamplingState
from flexmoe.engine.wire_rows import furthest_start
from flexmoe.scheduling.step import ScheduledChunk, Step


@dataclass(frozen=True, slots=True)
class DecodeTraits:
    """Of decodes: how many rows; how many tokens are before the last of any; whether some are drawn on the device, and
    some of these with a top_k or a top_p; whether the host samples some.
    """

    rows: int
    furthest: int
    draws: bool
    filtered: bool
    on_host: bool

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk], states: Sequence[SamplingState]) -> DecodeTraits:
        """Of the decodes of one data rank. If one needs the host, all are sampled there."""
        on_host = not all(state.device_ready for state in states)
        drawn = [state.params for state in states if not (on_host or state.params.greedy)]
        filtered = any(params.top_k > 0 or params.top_p < 1.0 for params in drawn)
        return cls(len(chunks), furthest_start(chunks), bool(drawn), filtered, on_host)

    def beside(self, other: DecodeTraits) -> DecodeTraits:
        """Of a step that serves both, each on its own data rank."""
        return DecodeTraits(
            max(self.rows, other.rows), max(self.furthest, other.furthest), self.draws or other.draws,
            self.filtered or other.filtered, self.on_host or other.on_host,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Together:
    """What data ranks must know of each other in a step. most_rows: of the part that has most.

    decodes: what all parts have in common, if there is nothing but decodes in them, and nobody wants their routing.
    """

    most_rows: int
    decodes: DecodeTraits | None

    @classmethod
    def of(cls, parts: Sequence[Step], states: Sequence[Sequence[SamplingState]]) -> Together:
        """states: of each part; some part has rows."""
        decodes = None
        alone = all(part.num_decodes == len(part.chunks) for part in parts)
        if alone and not any(state.wants_routing for own in states for state in own):
            traits = [DecodeTraits.of(part.chunks, own) for part, own in zip(parts, states, strict=True)]
            decodes = reduce(DecodeTraits.beside, traits)
        return cls(max(part.num_tokens for part in parts), decodes)
