"""Properties of scheduling under random arrivals, aborts, stop strings, failed steps, preemptions and evictions.

A model of the KV cache computes every step. A slot holds what real keys and values depend on: the token and all those
before it, *as read back from the cache*. So a block that is lost, shared by mistake, overwritten or reused too early
shows as a wrong prefix; and each sampled token is a function of the prefix read, so that it changes the answer too.
What is expected of a request comes from running it alone.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError
from flexmoe.scheduling import BlockManager, Request, RequestStatus, ScheduledChunk, Scheduler, Step

EOS = 0
FAMILIES = ([1, 2, 3, 4] * 8, [1, 2, 3, 4, 1, 2, 4, 4] * 4)  # the same first blocks, then different ones

Prefix = tuple[int, ...]


def next_token(prefix: Prefix) -> int:
    """The model: what comes next depends on the whole prefix, and is the end one time in eight."""
    return zlib.crc32(bytes(prefix)) % 8


def answer_alone(request: Request) -> list[int]:
    """What the request must answer, whatever runs beside it."""
    alone = Request(
        "alone",
        request.token_ids[: request.num_prompt_tokens],
        request.sampling,
        eos_token_ids=request.eos_token_ids,
        max_total_tokens=request.token_limit,
    )
    while alone.status is not RequestStatus.FINISHED:
        alone.append(next_token(tuple(alone.token_ids)))
    return alone.output_token_ids


@dataclass(frozen=True)
class Setup:
    num_blocks: int
    block_size: int
    seqs: int
    budget: int
    caching: bool
    evict_ahead: int  # pools this small never evict ahead by themselves
    watched: int = 0  # every so many-th request is; 0: none

    def scheduler(self) -> Scheduler:
        blocks = BlockManager(self.num_blocks, self.block_size, self.caching)
        blocks._evict_ahead = self.evict_ahead
        config = SchedulerConfig(max_num_seqs=self.seqs, max_num_batched_tokens=self.budget)
        return Scheduler(config, blocks)


class Engine:
    """The scheduler under test, the modelled cache, and the checks around every step."""

    expects = True  # whether Scheduler.expect is called, which may be left out

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.scheduler = setup.scheduler()
        self.slots: list[Prefix] = [()] * (setup.num_blocks * setup.block_size)
        self.requests: list[Request] = []
        self.pending: tuple[Step, list[list[int]]] | None = None  # a step, and the blocks of its chunks
        self.started: list[int] = []  # arrivals, in the order of their first chunk
        self.trace: list[Any] = []
        self.counts: Counter[str] = Counter()

    # -------------------------------------------------------------------------------------------- operations

    def add(self, prompt: list[int], max_total_tokens: int, sampling: SamplingParams) -> None:
        request_id = f"r{len(self.requests)}"
        capacity = self.setup.num_blocks * self.setup.block_size
        new_tokens = max_total_tokens if sampling.max_tokens is None else sampling.max_tokens
        reach = min(max_total_tokens, len(prompt) + new_tokens)
        if len(prompt) >= max_total_tokens or reach > capacity:
            with pytest.raises(RequestError):
                self._add(request_id, prompt, max_total_tokens, sampling)
        else:
            self.requests.append(self._add(request_id, prompt, max_total_tokens, sampling))
        self.check()

    def schedule(self) -> None:
        step = self.scheduler.schedule()
        self.pending = step, [chunk.request.blocks[:] for chunk in step.chunks]
        self.trace.append([(c.request.request_id, c.start, c.num_tokens, c.request.blocks[:]) for c in step.chunks])
        self.counts["preemptions"] += len(step.preempted)
        self.check_step(step)
        self.check()

    def update(self) -> None:
        assert self.pending is not None
        (step, tables), self.pending = self.pending, None
        self.expect(step)
        finished = self.scheduler.update(step, self.compute(step, tables))
        assert all(request.status is RequestStatus.FINISHED for request in finished)
        self.trace.append([request.request_id for request in finished])
        self.check()

    def expect(self, step: Step) -> None:
        if self.expects:
            self.scheduler.expect(step)
            self.check()

    def fail(self) -> None:
        """The step broke down somewhere: parts of it were written, none is recorded."""
        assert self.pending is not None
        (step, tables), self.pending = self.pending, None
        self.expect(step)
        for chunk, table in list(zip(step.chunks, tables, strict=True))[::2]:
            self.write(chunk, table)
        self.check()

    def abort(self, index: int) -> None:
        request = self.requests[index % len(self.requests)]
        was_finished = request.status is RequestStatus.FINISHED
        self.counts["aborts of scheduled"] += self.pending is not None and request.status is RequestStatus.RUNNING
        assert self.scheduler.abort(request.request_id) is (None if was_finished else request)
        assert request.status is RequestStatus.FINISHED
        self.check()

    def abort_scheduled(self, index: int) -> None:
        """Abort a request whose chunk is being computed."""
        assert self.pending is not None
        chunks = self.pending[0].chunks
        if chunks:
            self.abort(self.requests.index(chunks[index % len(chunks)].request))

    def stop(self, index: int) -> None:
        request = self.requests[index % len(self.requests)]
        if request.status is not RequestStatus.FINISHED:
            self.scheduler.finish(request, "stop", "stop string")
            assert (request.finish_reason, request.stop_reason) == ("stop", "stop string")
        self.check()

    def finish_all(self) -> None:
        """Every accepted request ends with the right answer, and every block comes back."""
        if self.pending is not None:
            self.update()
        for _ in range(3000):
            if not self.scheduler.has_unfinished:
                break
            self.schedule()
            self.update()
        assert not self.scheduler.has_unfinished, "a request never finishes"
        assert self.scheduler.blocks.num_free == self.setup.num_blocks
        for request in self.requests:
            self.check_answer(request)

    # -------------------------------------------------------------------------------------------- the modelled cache

    def slot(self, table: list[int], position: int) -> int:
        size = self.setup.block_size
        return table[position // size] * size + position % size

    def write(self, chunk: ScheduledChunk, table: list[int]) -> None:
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            before = self.slots[self.slot(table, position - 1)] if position else ()
            self.slots[self.slot(table, position)] = (*before, chunk.request.token_ids[position])

    def compute(self, step: Step, tables: list[list[int]]) -> list[int]:
        """All chunks, those of aborted requests included: the device was not told."""
        sampled = []
        for chunk, table in zip(step.chunks, tables, strict=True):
            self.write(chunk, table)
        for chunk, table in zip(step.chunks, tables, strict=True):
            end = chunk.start + chunk.num_tokens
            self.check_reads(chunk.request, table, end)
            if chunk.samples:
                sampled.append(next_token(self.slots[self.slot(table, end - 1)]))
        return sampled

    # -------------------------------------------------------------------------------------------- checks

    def running(self) -> list[Request]:
        return [request for request in self.requests if request.status is RequestStatus.RUNNING]

    def waiting(self) -> list[Request]:
        return [request for request in self.requests if request.status is RequestStatus.WAITING]

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (len(self.running()), len(self.waiting()))
        self.check_sharing()
        for request in self.running():
            self.check_reads(request, request.blocks, request.num_computed_tokens)

    def check_reads(self, request: Request, table: list[int], num_tokens: int) -> None:
        """The request reads back its own exact prefix at each computed position."""
        for position in range(num_tokens):
            assert self.slots[self.slot(table, position)] == tuple(request.token_ids[: position + 1])

    def check_sharing(self) -> None:
        """A block in two tables is at the same place, full, computed, and follows the same tokens."""
        holders: dict[int, list[tuple[int, Request]]] = defaultdict(list)
        for request in self.running():
            assert len(set(request.blocks)) == len(request.blocks)
            for index, block in enumerate(request.blocks):
                holders[block].append((index, request))
        for shared in holders.values():
            for index, request in shared[1:]:
                first_index, first = shared[0]
                end = (index + 1) * self.setup.block_size
                assert index == first_index
                assert request.token_ids[:end] == first.token_ids[:end]
                assert min(request.num_computed_tokens, first.num_computed_tokens) >= end
                self.counts["shared blocks"] += 1
        assert self.scheduler.blocks.num_free == self.setup.num_blocks - len(holders)

    def check_step(self, step: Step) -> None:
        assert step.num_tokens <= self.setup.budget
        assert len({chunk.request for chunk in step.chunks}) == len(step.chunks)
        assert step.chunks or not self.scheduler.has_unfinished, "nothing runs although something could"
        for index, chunk in enumerate(step.chunks):
            self.check_chunk(chunk, is_decode=index < step.num_decodes)
        for chunks in (step.chunks[: step.num_decodes], step.chunks[step.num_decodes :]):
            arrivals = [chunk.request.arrival for chunk in chunks]
            assert arrivals == sorted(arrivals)
        self.check_fairness(step)

    def check_chunk(self, chunk: ScheduledChunk, *, is_decode: bool) -> None:
        request, end = chunk.request, chunk.start + chunk.num_tokens
        assert request.status is RequestStatus.RUNNING
        assert chunk.num_tokens > 0
        assert chunk.start == request.num_computed_tokens
        assert chunk.samples == (end == request.num_tokens)
        assert is_decode == (chunk.start == request.num_tokens - 1)
        size = self.setup.block_size
        written = request.blocks[chunk.start // size : -(-end // size)]
        assert len(written) == -(-end // size) - chunk.start // size
        for block in written:
            assert [block in other.blocks for other in self.running()].count(True) == 1, "a shared block is written"
            assert block not in self.scheduler.blocks._prefixes, "a block that may be shared is written"

    def check_fairness(self, step: Step) -> None:
        """First come, first served; and no budget, seat or block is left idle while somebody could use it."""
        running, waiting = self.running(), self.waiting()
        oldest = {request.arrival for request in running}
        assert all(request.arrival > max(oldest, default=-1) for request in waiting)
        assert all(request in waiting for request in step.preempted)
        decoding = {request for request in running if request.num_computed_tokens == request.num_tokens - 1}
        patient = not any(request.watched for request in running + waiting)
        scheduled = {chunk.request for chunk in step.chunks}
        wait = decoding - scheduled
        self.started += sorted({request.arrival for request in scheduled | wait} - set(self.started))
        assert self.started == sorted(self.started)
        if wait:  # all of them, for prompts that leave them no room
            assert patient
            assert wait == decoding
            assert step.num_tokens + len(wait) > self.setup.budget
            found = {
                request for request in wait if not request.num_output_tokens
            }  # in the prefix cache, all but a token
            assert scheduled | wait == set(running) or step.num_tokens + len(found) >= self.setup.budget
            self.counts["decodes wait"] += 1
        elif step.num_tokens < self.setup.budget and (scheduled != set(running) or self.takes_more(step)):
            assert patient  # and prompts wait until there are more of them, as long as all room is taken
            assert scheduled == decoding != set()
            free = self.scheduler.blocks.num_free / self.setup.num_blocks
            assert min(free, 1 - len(running) / min(self.setup.seqs, self.setup.budget)) <= 1 / 8
            self.counts["prompts wait"] += 1

    def takes_more(self, step: Step) -> bool:
        """Whether the first that waits could start in this step."""
        waiting, num_running = self.waiting(), len(self.running())
        if not waiting or step.preempted or num_running >= self.setup.seqs:
            return False
        blocks = self.scheduler.blocks
        return blocks._shortfall(waiting[0], blocks._match(waiting[0]), num_running) <= 0

    def check_answer(self, request: Request) -> None:
        expected = answer_alone(request)
        if request.finish_reason == "abort" or request.stop_reason == "stop string":
            assert request.output_token_ids == expected[: request.num_output_tokens]
        else:
            assert request.output_token_ids == expected

    def _add(self, request_id: str, prompt: list[int], max_total_tokens: int, sampling: SamplingParams) -> Request:
        request = Request(request_id, prompt, sampling, eos_token_ids=(EOS,), max_total_tokens=max_total_tokens)
        request.watched = self.setup.watched > 0 and int(request_id[1:]) % self.setup.watched == 0
        self.scheduler.add(request)
        return request


# ------------------------------------------------------------------------------------------------ random histories

setups = st.builds(
    Setup,
    num_blocks=st.integers(3, 12),
    block_size=st.integers(1, 4),
    seqs=st.sampled_from([4, 3, 2, 1]),
    budget=st.sampled_from([20, 6, 3, 1]),
    caching=st.sampled_from([True, True, True, False]),
    evict_ahead=st.sampled_from([0, 0, 2, 4]),
    watched=st.sampled_from([0, 0, 4, 1]),
)
prompts = st.builds(
    lambda family, length, tail: FAMILIES[family][:length] + tail,
    st.integers(0, 1),
    st.sampled_from([12, 9, 4, 16, 24, 0]),
    st.lists(st.integers(1, 2), min_size=1, max_size=4),
)
samplings = st.builds(
    lambda max_tokens, min_tokens, ignore_eos, stop: SamplingParams(
        max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), ignore_eos=ignore_eos, stop_token_ids=stop
    ),
    st.sampled_from([24, 16, 8, 2, 1]),
    st.integers(0, 8),
    st.sampled_from([True, True, False]),
    st.sampled_from([[], [], [5]]),
)


arrivals_together = st.lists(st.tuples(prompts, samplings), min_size=2, max_size=6)


Arrival = tuple[list[int], SamplingParams]


class Serving(RuleBasedStateMachine):
    """Hypothesis calls the operations in any order; each is recorded, and the history repeated at the end."""

    engine_class = Engine

    @initialize(setup=setups, arrivals=arrivals_together)
    def start(self, setup: Setup, arrivals: list[Arrival]) -> None:
        self.engine = self.engine_class(setup)
        self.history: list[tuple[str, tuple[Any, ...]]] = []
        self.add(arrivals)

    def do(self, operation: str, *arguments: Any) -> None:
        self.history.append((operation, arguments))
        getattr(self.engine, operation)(*arguments)

    @rule(arrivals=arrivals_together)
    def add(self, arrivals: list[Arrival]) -> None:
        """Requests as an engine makes them: the total is clipped to what the cache holds, long prompts are cut."""
        capacity = self.engine.setup.num_blocks * self.engine.setup.block_size
        for prompt, sampling in arrivals:
            self.do("add", prompt[: capacity - capacity // 3], capacity, sampling)

    @rule(prompt=prompts, sampling=samplings)
    def add_unchecked(self, prompt: list[int], sampling: SamplingParams) -> None:
        self.do("add", prompt, 1000, sampling)

    @precondition(lambda self: self.engine.pending is None)
    @rule()
    def schedule(self) -> None:
        self.do("schedule")

    @precondition(lambda self: self.engine.pending is not None)
    @rule()
    def update(self) -> None:
        self.do("update")

    @precondition(lambda self: self.engine.pending is not None)
    @rule()
    def fail(self) -> None:
        self.do("fail")

    @precondition(lambda self: self.engine.pending is not None)
    @rule(index=st.integers(0, 5))
    def abort_scheduled(self, index: int) -> None:
        self.do("abort_scheduled", index)

    @precondition(lambda self: self.engine.pending is None)
    @rule(steps=st.integers(2, 10))
    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.do("schedule")
            self.do("update")

    @precondition(lambda self: self.engine.requests)
    @rule(index=st.integers(0, 30))
    def abort(self, index: int) -> None:
        self.do("abort", index)

    @precondition(lambda self: self.engine.requests)
    @rule(index=st.integers(0, 30))
    def stop(self, index: int) -> None:
        self.do("stop", index)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.do("finish_all")
        again = self.engine_class(self.engine.setup)
        again.expects = False
        for operation, arguments in self.history:
            getattr(again, operation)(*arguments)
        assert again.trace == self.engine.trace, "the same history gave other steps"


TestServing = pytest.mark.timeout(900)(Serving.TestCase)  # hypothesis shrinks a failure for up to 300 s
TestServing.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


# ------------------------------------------------------------------------------------------------ long histories


def random_operation(engine: Engine, rng: random.Random) -> None:
    draw, running = rng.random(), engine.running()
    if draw < 0.09:
        prompt = FAMILIES[rng.randrange(2)][: rng.randrange(20)] + rng.choices([1, 2], k=rng.randrange(1, 4))
        sampling = SamplingParams(max_tokens=rng.randrange(1, 20), ignore_eos=rng.random() < 0.7)
        engine.add(prompt, engine.setup.num_blocks * engine.setup.block_size, sampling)
    elif draw < 0.11 and running:
        engine.abort(engine.requests.index(rng.choice(running)))
    elif draw < 0.12 and running:
        engine.stop(engine.requests.index(rng.choice(running)))
    elif engine.pending is None:
        engine.schedule()
    elif draw < 0.15:
        engine.fail()
    else:
        engine.update()


@pytest.mark.parametrize(
    "setup", [Setup(10, 4, 6, 16, True, 0, 4), Setup(20, 2, 6, 9, True, 4, 1), Setup(9, 4, 4, 30, False, 0)]
)
def test_a_long_history_meets_every_event_and_loses_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rng = Engine(setup), random.Random(1)
    blocks, counts = engine.scheduler.blocks, engine.counts
    evict = blocks._evict
    monkeypatch.setattr(blocks, "_evict", lambda count: counts.update(evictions=count) or evict(count))
    for _ in range(2000):
        random_operation(engine, rng)
    engine.finish_all()
    assert (counts["preemptions"] > 20, counts["aborts of scheduled"] > 5) == (True, True)
    if setup.caching:
        assert (counts["evictions"] > 100, counts["shared blocks"] > 100) == (True, True)
        assert blocks.stats.hit_tokens > 100
