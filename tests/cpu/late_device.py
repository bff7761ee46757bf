"""A device that computes as late as it may, to test on a CPU what runs ahead of it.

A launch is queued, and computed when its tokens, or those of a later launch, are waited for: in the order of launches,
those that were given up included. It is computed by a real ModelRunner, from what was known at the launch and nothing
else, whatever has become of the requests since.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from flexmoe.engine import engine
from flexmoe.engine.model_runner import Flight, ModelRunner
from flexmoe.engine.sampler import SampleOutput
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk, Step
from tests.cpu.paging import request


@dataclass(eq=False)
class LateFlight:
    """A launch, with copies of its requests and states as they were.

    after: the launch that samples the tokens to compute, and which of its tokens they are; None if they were known.
    sampling: the requests that get a token, in order.
    """

    runner: LateRunner
    step: Step
    states: list[SamplingState]
    after: tuple[LateFlight, list[int]] | None
    sampling: list[Request]
    sampled: SampleOutput | None = None
    waited: bool = False

    def wait(self) -> SampleOutput:
        assert not self.waited, "waited for twice"
        self.waited = True
        self.runner.compute_until(self)
        assert self.sampled is not None, "waited for, although the launch before it failed"
        return self.sampled


class LateRunner(ModelRunner):
    """num_ahead: how many launches followed one whose tokens were not known; num_mixed_ahead: those with prompts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_ahead = self.num_mixed_ahead = 0
        self._queue: deque[LateFlight] = deque()

    def can_run_ahead(self, step: Step, states: Sequence[SamplingState]) -> bool:
        assert len(states) == step.num_samples
        return self.probe is None and all(state.device_ready for state in states)

    def launch(self, step: Step, states: Sequence[SamplingState], *, after: Flight | None = None) -> Flight:
        assert len(states) == step.num_samples
        source, unknown = None, int(after is not None)
        if after is not None:
            assert isinstance(after, LateFlight)
            assert after is self._queue[-1], "not the flight launched last"
            assert not after.waited, "its tokens are known"
            source = after, [_place(after.sampling, chunk) for chunk in step.chunks]
            self.num_ahead += 1
            self.num_mixed_ahead += step.num_decodes < len(step.chunks)
        pending = [0] * len(step.chunks) if source is None else [int(place >= 0) for place in source[1]]
        assert self.mixes_ahead or all(pending) or not unknown, "this device was not to be given prompts ahead"
        chunks = [_copy(chunk, of_chunk) for chunk, of_chunk in zip(step.chunks, pending, strict=True)]
        of_states = [of_chunk for chunk, of_chunk in zip(step.chunks, pending, strict=True) if chunk.samples]
        frozen = [_freeze(state, of_state) for state, of_state in zip(states, of_states, strict=True)]
        sampling = [chunk.request for chunk in step.chunks if chunk.samples]
        self._queue.append(LateFlight(self, Step(chunks, step.num_decodes, []), frozen, source, sampling))
        return self._queue[-1]

    def compute_until(self, flight: LateFlight) -> None:
        while flight in self._queue:
            self._compute(self._queue.popleft())

    def _compute(self, flight: LateFlight) -> None:
        if flight.after is not None:
            before, places = flight.after
            if before.sampled is None:
                return  # it failed
            for chunk, place in zip(flight.step.chunks, places, strict=True):
                if place >= 0:
                    chunk.request.token_ids.append(before.sampled.token_ids[place])
        flight.sampled = self.run(flight.step, flight.states)


class MixedLateRunner(LateRunner):
    """Takes prompts in steps that are launched ahead."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mixes_ahead = True


def _place(sampling: list[Request], chunk: ScheduledChunk) -> int:
    """Which of the tokens on their way the chunk is; -1 if its tokens are known."""
    return sampling.index(chunk.request) if chunk.request in sampling else -1


def _copy(chunk: ScheduledChunk, unknown: int) -> ScheduledChunk:
    """With what the host knows of the request now: all tokens of the chunk but the `unknown` last ones."""
    stop = chunk.start + chunk.num_tokens - unknown
    assert len(chunk.request.token_ids) == stop if chunk.samples else len(chunk.request.token_ids) > stop
    known = request(chunk.request.token_ids[:stop], chunk.request.blocks, chunk.request.request_id)
    return ScheduledChunk(known, chunk.start, chunk.num_tokens, chunk.samples)


def _freeze(state: SamplingState, unknown: int) -> SamplingState:
    assert state.device_ready or not unknown
    number = state.uniform(unknown)
    frozen = copy.copy(state)
    vars(frozen)["uniform"] = lambda: number
    return frozen


@contextmanager
def late_device(kind: type[LateRunner] = LateRunner) -> Iterator[None]:
    """Within, engines are made with a device that computes late."""
    with patch.object(engine, "ModelRunner", kind):
        yield
