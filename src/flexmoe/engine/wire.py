"""A step as plain data, for ranks in other processes. Enters: a Step and sampling states. Leaves: the same, elsewhere.

Only what a forward pass reads goes along: new tokens, positions, block tables. So a rank remembers nothing between
steps, and a step that was given up leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.model_runner import rows_before
from flexmoe.engine.numbers import int32s
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.engine.together import Together
from flexmoe.engine.wire_rows import WireChunks, WireDecodes
from flexmoe.scheduling.data_ranks import parts_of
from flexmoe.scheduling.step import Step

_ARGMAX = SamplingState(SamplingParams(temperature=0.0), 0)


@dataclass(frozen=True, slots=True)
class WireStep:
    """Chunks, and the states of those that sample.

    None stands for a state that asks for the argmax and nothing else, as most do. sources: if the step was sent before
    the tokens of the one before it were known, each chunk's row in that one; -1 for one whose token is known.
    """

    num_decodes: int
    chunks: WireChunks
    states: list[SamplingState | None]
    sources: list[int] | None = None


@dataclass(frozen=True, slots=True)
class WireParts:
    """What each data rank computes of a step, and, if there are several, what they must know of each other."""

    parts: list[WireStep]
    together: Together | None


def pack(step: Step, states: Sequence[SamplingState], sources: list[int] | None = None) -> WireStep:
    """The step, with what its requests hold now."""
    chunks = step.chunks
    unknown = [] if sources is None else [0]
    tokens: list[int] = []
    blocks: list[int] = []
    for chunk in chunks:
        tokens += chunk.request.token_ids[chunk.start : chunk.start + chunk.num_tokens] or unknown
        blocks += chunk.request.blocks
    arrays = WireChunks(
        np.array([chunk.start for chunk in chunks], np.int32),
        np.array([chunk.num_tokens for chunk in chunks], np.int32),
        np.array([len(chunk.request.blocks) for chunk in chunks], np.int32),
        [chunk.samples for chunk in chunks],
        [chunk.request.contiguous for chunk in chunks],
        int32s(tokens),
        int32s(blocks),
    )
    known = [None if state.plain_greedy and not state.wants_routing else state for state in states]
    return WireStep(step.num_decodes, arrays, known, sources)


def unpack(wire: WireStep) -> tuple[Step, list[SamplingState]]:
    """The step as a runner takes it."""
    alone = wire.num_decodes == len(wire.chunks)
    chunks = WireDecodes(wire.chunks) if alone else wire.chunks.as_chunks()
    return Step(chunks, wire.num_decodes, []), [state or _ARGMAX for state in wire.states]


def pack_parts(step: Step, states: Sequence[SamplingState], before: Step | None = None) -> WireParts:
    """What each data rank computes of a step: its own part, or the step where there is one.

    before: the step whose tokens are not known yet, which these decodes continue.
    """
    parts, own_states, start = parts_of(step), [], 0
    for part in parts:
        own_states.append(states[start : start + part.num_samples])
        start += part.num_samples
    sources = [None] * len(parts) if before is None else [*map(rows_before, parts, parts_of(before))]
    packed = [pack(*each) for each in zip(parts, own_states, sources, strict=True)]
    return WireParts(packed, Together.of(parts, own_states) if len(parts) > 1 else None)
