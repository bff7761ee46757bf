"""Launched: a step on its way. Enters: a step, its flight, whose tokens it samples. Leaves: what the engine asks."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe.engine.model_runner import Flight
from flexmoe.engine.sampler import SamplingState
from flexmoe.engine.tracking import Sample, Tracked
from flexmoe.scheduling.request import RequestStatus
from flexmoe.scheduling.step import Step


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that is being computed, and whom its tokens are for: one entry for each chunk that samples.

    since: when its launch began, in seconds of `time.monotonic()`.
    """

    step: Step
    samples: list[tuple[Tracked, Sample]]
    since: float
    flight: Flight

    @property
    def wanted(self) -> bool:
        """Whether a request of it still goes on."""
        return any(chunk.request.status is RequestStatus.RUNNING for chunk in self.step.chunks)

    @property
    def states(self) -> list[SamplingState]:
        """Of the samples."""
        return [sample.state for _, sample in self.samples]
