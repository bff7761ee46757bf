"""DataRanks: a scheduler for each data rank, behind the face of one. Enters: requests. Leaves: a step for all of them.

A request belongs to one data rank from its arrival to its end: its keys are there, and what it shares with others. It
goes where the fewest tokens are outstanding, counted as prompt and longest output of all that have not finished.
Limits of a step and blocks are each data rank's own, and so are preemption and prefix reuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.config.engine import SchedulerConfig
from flexmoe.scheduling.block_manager import BlockManager, PrefixStats
from flexmoe.scheduling.request import FinishReason, Request, RequestStatus
from flexmoe.scheduling.roofline import StepTokens
from flexmoe.scheduling.scheduler import Scheduler
from flexmoe.scheduling.step import Step


@dataclass(slots=True)
class JointStep(Step):
    """What all data ranks compute at once. parts: of each its own step, which may be empty.

    chunks: of all parts, rank by rank, so that here decodes do not come first; num_decodes: how many those are.
    """

    parts: list[Step]

    @classmethod
    def of(cls, parts: list[Step]) -> JointStep:
        chunks = [chunk for part in parts for chunk in part.chunks]
        preempted = [request for part in parts for request in part.preempted]
        return cls(chunks, sum(part.num_decodes for part in parts), preempted, parts)


def parts_of(step: Step) -> list[Step]:
    """What each data rank computes of a step: the step itself where there is one."""
    return step.parts if isinstance(step, JointStep) else [step]


@dataclass(frozen=True, slots=True)
class BlockTotals:
    """Blocks of all data ranks together, and what was looked up in their prefix caches."""

    num_blocks: int
    num_free: int
    stats: PrefixStats


class DataRanks:
    """Offers what Scheduler offers, on several data ranks."""

    def __init__(
        self, config: SchedulerConfig, blocks: Sequence[BlockManager], tokens: StepTokens | None = None, *,
        one_pass: bool = False,
    ) -> None:  # fmt: skip
        """blocks: of each data rank, all of one size. tokens, one_pass: see Scheduler."""
        self.schedulers = [Scheduler(config, own, tokens, one_pass=one_pass) for own in blocks]
        self._outstanding = [0] * len(blocks)  # tokens
        self._rank_of: dict[str, int] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._rank_of)

    @property
    def num_waiting(self) -> int:
        return sum(scheduler.num_waiting for scheduler in self.schedulers)

    @property
    def num_running(self) -> int:
        return sum(scheduler.num_running for scheduler in self.schedulers)

    @property
    def blocks(self) -> BlockTotals:
        """Figures of now, for people: requests live within the blocks of their own data rank."""
        managers = [scheduler.blocks for scheduler in self.schedulers]
        queried = sum(own.stats.queried_tokens for own in managers)
        hits = sum(own.stats.hit_tokens for own in managers)
        free = sum(own.num_free for own in managers)
        return BlockTotals(sum(own.num_blocks for own in managers), free, PrefixStats(queried, hits))

    @property
    def max_tokens(self) -> int:
        """The budget of a step of one data rank."""
        return self.schedulers[0].max_tokens

    @property
    def num_tokens(self) -> int:
        """See Scheduler.num_tokens: of one data rank, since a request is on one."""
        return self.schedulers[0].num_tokens

    def add(self, request: Request) -> None:
        """Queue a request on the data rank with the fewest outstanding tokens. Raises RequestError as a Scheduler."""
        lightest = self._outstanding.index(min(self._outstanding))
        rank = self._rank_of.get(request.request_id, lightest)  # where its id is taken, that is said
        self.schedulers[rank].add(request)
        self._rank_of[request.request_id] = rank
        self._outstanding[rank] += request.token_limit

    def abort(self, request_id: str) -> Request | None:
        """See Scheduler.abort."""
        rank = self._rank_of.get(request_id)
        request = None if rank is None else self.schedulers[rank].abort(request_id)
        if request is not None:
            self._forget(request)
        return request

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """See Scheduler.finish."""
        goes_on = request.status is not RequestStatus.FINISHED
        self.schedulers[self._rank_of.get(request.request_id, 0)].finish(request, reason, stop_reason)
        if goes_on:
            self._forget(request)

    def schedule(self) -> JointStep:
        """The next step of every data rank; without chunks when nothing can run on any."""
        self._tell_who_watches()
        return JointStep.of([scheduler.schedule() for scheduler in self.schedulers])

    def schedule_ahead(self, step: Step, *, prompts: bool = False) -> JointStep | None:
        """See Scheduler.schedule_ahead. None if a data rank that has requests must wait for this step's tokens."""
        assert isinstance(step, JointStep)
        assert not prompts, "data ranks agree on their passes, which takes the host"
        self._tell_who_watches()
        parts: list[Step] = []
        for scheduler, part in zip(self.schedulers, step.parts, strict=True):
            idle = not (scheduler.num_running or scheduler.num_waiting)
            ahead = Step([], 0, []) if idle else scheduler.schedule_ahead(part)
            if ahead is None:
                return None  # what others grew they keep: these blocks are the next that they need
            parts.append(ahead)
        return JointStep.of(parts) if any(part.chunks for part in parts) else None

    def expect(self, step: Step) -> None:
        """See Scheduler.expect."""
        for scheduler, part in zip(self.schedulers, parts_of(step), strict=True):
            scheduler.expect(part)

    def update(self, step: Step, sampled: Sequence[int]) -> list[Request]:
        """See Scheduler.update. sampled: rank by rank."""
        assert isinstance(step, JointStep)
        if len(sampled) != step.num_samples:
            raise ValueError(f"{len(sampled)} tokens were sampled for a step that samples {step.num_samples}")
        finished, start = [], 0
        for scheduler, part in zip(self.schedulers, step.parts, strict=True):
            finished += scheduler.update(part, sampled[start : start + part.num_samples])
            start += part.num_samples
        for request in finished:
            self._forget(request)
        return finished

    def observe(self, step: Step, seconds: float) -> None:
        """See Scheduler.observe: all data ranks wait for the slowest, so its time is everybody's."""
        assert isinstance(step, JointStep)
        for scheduler, part in zip(self.schedulers, step.parts, strict=True):
            if part.chunks:
                scheduler.observe(part, seconds)

    def check_integrity(self) -> None:
        """Raise AssertionError if queues, blocks or the tokens outstanding contradict each other."""
        for rank, scheduler in enumerate(self.schedulers):
            scheduler.check_integrity()
            known = sum(home == rank for home in self._rank_of.values())
            if known != scheduler.num_waiting + scheduler.num_running or (known > 0) != (self._outstanding[rank] > 0):
                raise AssertionError(
                    f"data rank {rank}: {known} requests, {self._outstanding[rank]} tokens outstanding"
                )

    def _tell_who_watches(self) -> None:
        """A step is as long as its longest part, so whoever reads along on one data rank waits for all."""
        watched = any(scheduler.num_watched for scheduler in self.schedulers)
        for scheduler in self.schedulers:
            scheduler.watched_elsewhere = watched

    def _forget(self, request: Request) -> None:
        self._outstanding[self._rank_of.pop(request.request_id)] -= request.token_limit


def scheduler_for(
    config: SchedulerConfig, blocks: Sequence[BlockManager], tokens: StepTokens | None = None, *, one_pass: bool = False
) -> Scheduler | DataRanks:
    """A scheduler for one data rank, or one for each. blocks: of each. The others: see Scheduler."""
    if len(blocks) == 1:
        return Scheduler(config, blocks[0], tokens, one_pass=one_pass)
    return DataRanks(config, blocks, tokens, one_pass=one_pass)
