"""Running ahead: a step is chosen and launched while the tokens of the one before it are still being computed.

First one test for each behaviour, then random histories with a device that computes as late as it may, in the order
of the launches: rows of requests that have ended, and steps that were given up, write long after the scheduler has
moved on. The modelled cache of test_scheduling_properties shows what they spoil, and each request must answer what it
answers alone, which is also what it answers without running ahead.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from flexmoe.config.sampling import SamplingParams
from flexmoe.scheduling import Request, RequestStatus, ScheduledChunk, Step, StepTokens
from tests.unit import test_scheduling_properties as properties
from tests.unit.test_scheduler import EOS, add, advance, scheduler, shape

# ------------------------------------------------------------------------------------------------ the next step


def test_the_pending_token_of_each_request_is_computed() -> None:
    serving = scheduler()
    first, second = add(serving, "a", 5), add(serving, "b", 2)
    step = serving.schedule()
    ahead = serving.schedule_ahead(step)
    assert ahead is not None
    assert shape(ahead) == [("a", 5, 1, True), ("b", 2, 1, True)]
    assert (ahead.num_decodes, ahead.preempted) == (2, [])
    serving.update(step, [7, 8])
    further = serving.schedule_ahead(ahead)
    assert further is not None
    assert shape(further) == [("a", 6, 1, True), ("b", 3, 1, True)]
    for computed, tokens in ((ahead, [9, 10]), (further, [11, 12])):
        serving.check_integrity()
        serving.update(computed, tokens)
    assert (first.output_token_ids, second.output_token_ids) == ([7, 9, 11], [8, 10, 12])
    assert shape(serving.schedule()) == [("a", 7, 1, True), ("b", 4, 1, True)]


def test_requests_that_the_pending_token_ends_are_left_out() -> None:
    serving = scheduler()
    add(serving, "a", 5, max_tokens=2)
    add(serving, "b", 5, max_tokens=3)
    advance(serving)
    step = serving.schedule()
    ahead = serving.schedule_ahead(step)
    assert ahead is not None
    assert shape(ahead) == [("b", 6, 1, True)]
    serving.update(step, [7, 7])
    assert serving.schedule_ahead(ahead) is None  # nobody goes on
    serving.update(ahead, [7])
    assert not serving.has_unfinished


def test_requests_that_have_ended_are_left_out_and_their_rows_skipped() -> None:
    serving = scheduler(caching=True)
    stopped, aborted, other = add(serving, "a", 7), add(serving, "b", 7), add(serving, "c", 7)
    step = serving.schedule()
    ahead = serving.schedule_ahead(step)
    assert ahead is not None
    assert serving.update(step, [EOS, 7, 7]) == [stopped]
    serving.abort("b")
    further = serving.schedule_ahead(ahead)
    assert further is not None
    assert shape(further) == [("c", 8, 1, True)]
    assert serving.update(ahead, [1, 2, 3]) == []
    assert [r.output_token_ids for r in (stopped, aborted, other)] == [[EOS], [7], [7, 3]]
    serving.check_integrity()


def test_everybody_has_ended() -> None:
    serving = scheduler()
    add(serving, "a", 5)
    step = serving.schedule()
    serving.abort("a")
    assert serving.schedule_ahead(step) is None


def test_nothing_runs() -> None:
    serving = scheduler()
    assert serving.schedule_ahead(serving.schedule()) is None


def test_an_incomplete_prompt_comes_first() -> None:
    serving = scheduler(budget=4)
    add(serving, "a", 2)
    add(serving, "b", 6, watched=True)
    steps = [serving.schedule()]
    while not steps[-1].num_samples == len(steps[-1].chunks) == 2:
        assert serving.schedule_ahead(steps[-1]) is None
        serving.update(steps[-1], [7] * steps[-1].num_samples)
        steps.append(serving.schedule())
    assert [shape(step)[-1] for step in steps] == [("b", 0, 2, False), ("b", 2, 3, False), ("b", 5, 1, True)]
    assert serving.schedule_ahead(steps[-1]) is not None


def test_an_incomplete_prompt_that_the_step_has_no_room_for() -> None:
    serving = scheduler(budget=4)
    add(serving, "a", 2)
    add(serving, "b", 6, watched=True)
    advance(serving)
    serving.sizes = StepTokens(1, 1)
    step = serving.schedule()
    assert shape(step) == [("a", 2, 1, True)]
    assert serving.schedule_ahead(step) is None


def test_a_block_is_taken_for_the_pending_token_and_kept_if_the_step_is_given_up() -> None:
    serving = scheduler()
    request = add(serving, "a", 4)
    step = serving.schedule()
    assert len(request.blocks) == 1
    assert serving.schedule_ahead(step) is not None
    assert len(request.blocks) == 2
    assert shape(serving.schedule()) == [("a", 0, 4, True)]
    assert len(request.blocks) == 2
    serving.check_integrity()


def test_too_few_blocks_and_nobody_is_preempted() -> None:
    serving = scheduler(num_blocks=3)
    for name in "ab":
        add(serving, name, 4)
    step = serving.schedule()
    before = [request.blocks[:] for request in (chunk.request for chunk in step.chunks)]
    assert serving.schedule_ahead(step) is None
    assert [chunk.request.blocks for chunk in step.chunks] == before
    assert serving.num_running == 2


def test_a_step_is_not_recorded_twice() -> None:
    serving = scheduler()
    add(serving, "a", 4)
    step = advance(serving)
    with pytest.raises(AssertionError, match="recorded twice"):
        serving.update(step, [7])


# ------------------------------------------------------------------------------------------------ who waits


def test_a_newcomer_is_not_kept_waiting() -> None:
    serving = scheduler()
    add(serving, "a", 4)
    step = serving.schedule()
    add(serving, "b", 4)
    assert serving.schedule_ahead(step) is None


def test_a_newcomer_may_wait_for_a_seat() -> None:
    for seats, budget in ((1, 100), (8, 1)):
        serving = scheduler(seqs=seats, budget=budget)
        add(serving, "a", 1)
        step = serving.schedule()
        add(serving, "b", 4)
        assert serving.schedule_ahead(step) is not None


def test_a_newcomer_may_wait_for_blocks() -> None:
    serving = scheduler(num_blocks=8)
    add(serving, "a", 16)
    advance(serving)
    add(serving, "b", 20)
    step = serving.schedule()  # learns that "b" does not fit
    assert serving.schedule_ahead(step) is not None


@pytest.mark.parametrize(("seats", "num_blocks"), [(2, 64), (8, 9)])
def test_room_that_a_length_will_make_is_foreseen(seats: int, num_blocks: int) -> None:
    """A seat, or blocks: the newcomer comes in at the same step as without running ahead."""
    serving = scheduler(seqs=seats, num_blocks=num_blocks)
    add(serving, "a", 13, max_tokens=3)
    add(serving, "b", 2)
    newcomer = add(serving, "c", 9)
    advance(serving)
    step = serving.schedule()
    ahead = serving.schedule_ahead(step)
    assert ahead is not None
    serving.update(step, [7, 7])
    assert serving.schedule_ahead(ahead) is None  # it ends "a"
    serving.update(ahead, [7, 7])
    assert [chunk.request.request_id for chunk in serving.schedule().chunks] == ["b", "c"]
    assert newcomer.status is RequestStatus.RUNNING


def test_a_newcomer_that_waits_for_others_keeps_no_step_from_running_ahead() -> None:
    serving = scheduler(budget=8, seqs=8)
    for index in range(8):
        add(serving, f"{index}", 1, max_tokens=2 + 9 * (index > 0))
    for _ in range(2):
        advance(serving)
    for name in "abc":
        add(serving, name, 4)
    step = serving.schedule()
    assert len(step.chunks) == 7, "one seat of eight is free, and one prompt does not fill a step"
    assert serving.schedule_ahead(step) is not None
    add(serving, "d", 1, watched=True)
    assert serving.schedule_ahead(step) is None


def test_room_that_a_stop_makes_is_given_one_step_later() -> None:
    serving = scheduler(seqs=1)
    add(serving, "a", 4)
    add(serving, "b", 4)
    step = serving.schedule()
    ahead = serving.schedule_ahead(step)
    assert ahead is not None
    serving.update(step, [EOS])
    assert serving.schedule_ahead(ahead) is None
    serving.update(ahead, [7])
    assert shape(serving.schedule()) == [("b", 0, 4, True)]


def test_a_preempted_request_is_not_kept_waiting() -> None:
    serving = scheduler(num_blocks=4)
    add(serving, "a", 7)
    add(serving, "b", 3)
    advance(serving)
    advance(serving)
    step = serving.schedule()
    assert step.preempted
    assert serving.schedule_ahead(step) is None


# ------------------------------------------------------------------------------------------------ random histories


@dataclass(eq=False)
class Launch:
    """A step on its way to the device, with what was known when it was launched.

    tokens: of each chunk, those that the host knew; None where it is the token that `after` samples.
    known: the tokens that each request then had.
    broken: the device failed at it, or runs on what a failed one left.
    """

    step: Step
    tables: list[list[int]]
    tokens: list[list[int] | None]
    known: list[list[int]]
    after: Launch | None
    broken: bool = False
    sampled: dict[Request, int] = field(default_factory=dict)

    @classmethod
    def of(cls, step: Step, after: Launch | None = None) -> Launch:
        tables = [chunk.request.blocks[:] for chunk in step.chunks]
        known = [chunk.request.token_ids[:] for chunk in step.chunks]
        tokens: list[list[int] | None] = [
            None if chunk.start == len(ids) else ids[chunk.start : chunk.start + chunk.num_tokens]
            for chunk, ids in zip(step.chunks, known, strict=True)
        ]
        return cls(step, tables, tokens, known, after)

    def written(self, size: int) -> set[int]:
        """The blocks that its rows write."""
        spans = zip(self.step.chunks, self.tables, strict=True)
        return {table[p // size] for c, table in spans for p in range(c.start, c.start + c.num_tokens)}


class AheadEngine(properties.Engine):
    """Steps on their way: one or two. The device computes a launch only when it has to."""

    def __init__(self, setup: properties.Setup) -> None:
        super().__init__(setup)
        self.flights: deque[Launch] = deque()  # launched, not updated
        self.device: deque[Launch] = deque()  # launched, not computed; holds those given up, too

    def schedule(self) -> None:
        super().schedule()  # checks the step, and that it admits whom it can
        assert self.pending is not None
        self.launch(Launch.of(self.pending[0]))

    def ahead(self) -> None:
        """Choose the next step, if one is on its way and a next one can be chosen."""
        if len(self.flights) != 1:
            return
        (flight,) = self.flights
        admits, free = self.head_fits(), self.scheduler.blocks.num_free
        step = self.scheduler.schedule_ahead(flight.step)
        if step is None:
            assert self.scheduler.blocks.num_free == free
            self.counts["not ahead"] += 1
        else:
            if admits:  # prompts wait until there are more of them, as long as all room is taken
                assert not any(request.watched for request in self.running() + self.waiting()), "kept from who fits"
                going = {chunk.request for chunk in step.chunks}
                free += sum(len(request.blocks) for request in self.running() if request not in going)
                assert min(free / self.setup.num_blocks, 1 - len(going) / self.setup.seqs) <= 1 / 8
            self.check_ahead(flight.step, step)
            self.trace.append([(chunk.request.request_id, chunk.start) for chunk in step.chunks])
            self.launch(Launch.of(step, flight))
            self.counts["ahead"] += 1
        self.check()

    def launch(self, launch: Launch) -> None:
        self.flights.append(launch)
        self.device.append(launch)
        self.pending = self.flights[0].step, self.flights[0].tables

    def update(self) -> None:
        flight = self.flights.popleft()
        while not flight.sampled and flight in self.device:
            self.run_next()
        self.expect(flight.step)
        chunks = [chunk for chunk in flight.step.chunks if chunk.samples]
        self.counts["rows in vain"] += sum(chunk.request.status is RequestStatus.FINISHED for chunk in chunks)
        finished = self.scheduler.update(flight.step, [flight.sampled[chunk.request] for chunk in chunks])
        self.trace.append([request.request_id for request in finished])
        self.pending = (self.flights[0].step, self.flights[0].tables) if self.flights else None
        self.check()

    def fail(self) -> None:
        """The step is given up, and the one behind it, though the device may compute them yet: in vain."""
        self.counts["given up"] += len(self.flights)
        self.flights.clear()
        self.pending = None
        self.check()

    def break_down(self) -> None:
        """The device fails in the middle of the step."""
        for flight in self.flights:
            flight.broken = True
        self.fail()

    def finish_all(self) -> None:
        while self.flights:
            self.update()
        for _ in range(3000):
            if not self.scheduler.has_unfinished:
                break
            if not self.flights:
                self.schedule()
            self.ahead()
            self.update()
        while self.flights:
            self.update()
        super().finish_all()

    # -------------------------------------------------------------------------------------------- the device

    def run_next(self) -> None:
        launch = self.device.popleft()
        rows = list(zip(launch.step.chunks, launch.tables, self.inputs(launch), strict=True))
        for chunk, table, tokens in rows[:: 2 if launch.broken else 1]:
            for position, token in enumerate(tokens, chunk.start):
                before = self.slots[self.slot(table, position - 1)] if position else ()
                self.slots[self.slot(table, position)] = (*before, token)
        for (chunk, table, tokens), known in zip(rows, launch.known, strict=True):
            end = chunk.start + chunk.num_tokens
            prefix = self.slots[self.slot(table, end - 1)]
            if not launch.broken:  # rows in vain included: nobody may have written into their blocks either
                expected = (*known[: chunk.start], *tokens)
                assert [self.slots[self.slot(table, p)] for p in range(end)] == [expected[: p + 1] for p in range(end)]
            if chunk.samples:
                launch.sampled[chunk.request] = properties.next_token(prefix)

    def inputs(self, launch: Launch) -> list[list[int]]:
        """The tokens of each chunk; those that the host did not know are on the device by now."""
        found = []
        for chunk, tokens in zip(launch.step.chunks, launch.tokens, strict=True):
            if tokens is None:
                assert launch.after is not None
                tokens = [launch.after.sampled[chunk.request]]
            found.append(tokens)
        return found

    # -------------------------------------------------------------------------------------------- checks

    def head_fits(self) -> bool:
        waiting, running = self.waiting(), self.running()
        if not waiting or len(running) >= min(self.setup.seqs, self.setup.budget):
            return False
        blocks = self.scheduler.blocks
        return blocks._shortfall(waiting[0], blocks._match(waiting[0]), len(running)) <= 0

    def check(self) -> None:
        super().check()
        # While a row may still write into a block, nobody can find that block in the prefix cache.
        for launch in self.device:
            for block in launch.written(self.setup.block_size):
                assert block not in self.scheduler.blocks._prefixes

    def check_ahead(self, before: Step, step: Step) -> None:
        assert step.num_tokens == step.num_decodes == len(step.chunks) <= self.setup.budget
        assert step.preempted == []
        chunks = {chunk.request: chunk for chunk in before.chunks}
        places = [before.chunks.index(chunks[chunk.request]) for chunk in step.chunks]
        assert places == sorted(set(places))
        sure = [r for r in self.running() if r.num_tokens + 1 < r.token_limit]
        assert {chunk.request for chunk in step.chunks} == set(sure)
        for chunk in step.chunks:
            self.check_ahead_chunk(chunk, chunks[chunk.request])

    def check_ahead_chunk(self, chunk: ScheduledChunk, before: ScheduledChunk) -> None:
        request = chunk.request
        assert (chunk.num_tokens, chunk.samples, before.samples) == (1, True, True)
        assert chunk.start == before.start + before.num_tokens == request.num_tokens
        block = request.blocks[chunk.start // self.setup.block_size]
        assert [block in other.blocks for other in self.running()].count(True) == 1, "a shared block is written"


class MixedAheadEngine(AheadEngine):
    """Prompts, too, are computed in steps that are launched ahead."""

    def ahead(self) -> None:
        if len(self.flights) != 1:
            return
        (flight,) = self.flights
        waiting, free = self.waiting(), self.scheduler.blocks.num_free
        step = self.scheduler.schedule_ahead(flight.step, prompts=True)
        if step is None:
            assert (self.waiting(), self.scheduler.blocks.num_free) == (waiting, free)
            self.counts["not ahead"] += 1
        else:
            self.check_mixed(flight.step, step)
            self.trace.append([(chunk.request.request_id, chunk.start) for chunk in step.chunks])
            self.launch(Launch.of(step, flight))
            self.counts["ahead"] += 1
            self.counts["prompts ahead"] += step.num_decodes < len(step.chunks)
            self.counts["behind prompts"] += flight.step.num_decodes < len(flight.step.chunks)
        self.check()

    def check_mixed(self, before: Step, step: Step) -> None:
        assert step.num_tokens <= self.setup.budget
        assert step.preempted == []
        assert all(chunk.num_tokens == 1 and chunk.samples for chunk in step.chunks[: step.num_decodes])
        came = {chunk.request: chunk for chunk in before.chunks}
        sampled = {request for request, chunk in came.items() if chunk.samples}
        chunks = {chunk.request: chunk for chunk in step.chunks}
        assert len(chunks) == len(step.chunks)
        # Decodes: all that are sure to go on, or they wait for prompts that leave them no room.
        goes_on = {r for r in self.running() if r in sampled and r.num_tokens + 1 < r.token_limit}
        ends = {r: came[r].start + came[r].num_tokens if r in came else r.num_computed_tokens for r in self.running()}
        goes_on |= {
            request for request, end in ends.items() if end == request.num_tokens - 1 and request not in sampled
        }
        patient = not any(request.watched for request in self.running() + self.waiting())
        wait = goes_on - set(chunks)
        if wait:
            assert patient
            assert wait == goes_on
            assert step.num_tokens + len(wait) > self.setup.budget
            self.counts["decodes wait"] += 1
        for request, chunk in chunks.items():
            end = ends[request]
            assert chunk.start == end
            assert chunk.samples == (end + chunk.num_tokens == request.num_tokens + (request in sampled))
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                block = request.blocks[position // self.setup.block_size]
                assert [block in other.blocks for other in self.running()].count(True) == 1, "a shared block is written"
        # Prompts: in order of arrival, the first without fail if a token is left, or they wait until there are more.
        partial = [request for request in self.running() if request not in sampled | goes_on]
        served = [request for request in partial if request in chunks]
        assert served == partial[: len(served)]
        if len(served) < len(partial) and step.num_tokens + len(sampled) < self.setup.budget:
            assert patient
            assert set(chunks) == goes_on != set()
            self.counts["prompts wait"] += 1


class ServingAhead(properties.Serving):
    """As there, and ahead of what is computed wherever hypothesis likes."""

    engine_class = AheadEngine

    @precondition(lambda self: self.engine.pending is not None)
    @rule()
    def ahead(self) -> None:
        self.do("ahead")

    @precondition(lambda self: self.engine.pending is not None)
    @rule()
    def break_down(self) -> None:
        self.do("break_down")

    @precondition(lambda self: self.engine.pending is not None)
    @rule(steps=st.integers(2, 10))
    def advance_ahead(self, steps: int) -> None:
        """As an engine does it."""
        for _ in range(steps):
            if self.engine.pending is None:
                self.do("schedule")
            self.do("ahead")
            self.do("update")


class ServingMixed(ServingAhead):
    """The same with prompts in steps that are launched ahead."""

    engine_class = MixedAheadEngine


TestServingMixed = pytest.mark.timeout(900)(ServingMixed.TestCase)
TestServingMixed.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestServingAhead = pytest.mark.timeout(900)(ServingAhead.TestCase)
TestServingAhead.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_prompts_are_computed_ahead_where_the_device_can() -> None:
    serving = scheduler(budget=8)
    add(serving, "a", 3, max_tokens=2)
    add(serving, "b", 12)
    add(serving, "c", 2, watched=True)
    step = serving.schedule()
    assert shape(step) == [("a", 0, 3, True), ("b", 0, 5, False)]
    ahead = serving.schedule_ahead(step, prompts=True)
    assert ahead is not None
    assert (shape(ahead), ahead.num_decodes) == ([("a", 3, 1, True), ("b", 5, 7, True)], 1)
    serving.update(step, [7])
    further = serving.schedule_ahead(ahead, prompts=True)
    assert further is not None
    assert shape(further) == [("b", 12, 1, True), ("c", 0, 2, True)]  # "a" ends by its length
    for computed, tokens in ((ahead, [8, 9]), (further, [10, 11])):
        serving.update(computed, tokens)
        serving.check_integrity()
    assert shape(serving.schedule()) == [("b", 13, 1, True), ("c", 2, 1, True)]


def test_decodes_wait_for_prompts_ahead_too() -> None:
    serving = scheduler(budget=8)
    first = add(serving, "a", 7)
    add(serving, "b", 9)
    step = serving.schedule()
    assert shape(step) == [("a", 0, 7, True), ("b", 0, 1, False)]
    ahead = serving.schedule_ahead(step, prompts=True)
    assert ahead is not None
    assert shape(ahead) == [("b", 1, 8, True)]
    assert len(first.blocks) == 2, "its next token has its place all the same"
    serving.update(step, [7])
    further = serving.schedule_ahead(ahead, prompts=True)
    assert further is not None
    assert shape(further) == [("b", 9, 1, True), ("a", 7, 1, True)]
    for computed, tokens in ((ahead, [8]), (further, [9, 10])):
        serving.update(computed, tokens)
        serving.check_integrity()


def test_a_prompt_that_lacks_one_token_is_a_decode_ahead_too() -> None:
    serving = scheduler(budget=4)
    add(serving, "a", 5)
    step = serving.schedule()
    add(serving, "b", 1)
    ahead = serving.schedule_ahead(step, prompts=True)
    assert ahead is not None
    assert (shape(ahead), ahead.num_decodes) == ([("a", 4, 1, True), ("b", 0, 1, True)], 2)


def test_a_step_ahead_that_admitted_somebody_can_be_given_up() -> None:
    serving = scheduler()
    add(serving, "a", 4)
    step = serving.schedule()
    newcomer = add(serving, "b", 6)
    assert serving.schedule_ahead(step, prompts=True) is not None
    assert newcomer.status is RequestStatus.RUNNING
    serving.check_integrity()
    assert shape(serving.schedule()) == [("a", 0, 4, True), ("b", 0, 6, True)]


def random_operation(engine: AheadEngine, rng: random.Random) -> None:
    draw, running = rng.random(), engine.running()
    if draw < 0.09:
        prompt = properties.FAMILIES[rng.randrange(2)][: rng.randrange(20)] + rng.choices([1, 2], k=rng.randrange(1, 4))
        sampling = SamplingParams(max_tokens=rng.randrange(1, 30), ignore_eos=rng.random() < 0.5)
        engine.add(prompt, engine.setup.num_blocks * engine.setup.block_size, sampling)
    elif draw < 0.11 and running:
        engine.abort(engine.requests.index(rng.choice(running)))
    elif draw < 0.12 and running:
        engine.stop(engine.requests.index(rng.choice(running)))
    elif not engine.flights:
        engine.schedule()
    elif draw < 0.14:
        engine.fail()
    elif draw < 0.15:
        engine.break_down()
    elif draw < 0.6:
        engine.ahead()
    else:
        engine.update()


@pytest.mark.parametrize(
    "setup",
    [
        properties.Setup(10, 4, 6, 16, True, 0),
        properties.Setup(20, 2, 6, 9, True, 4),
        properties.Setup(9, 4, 4, 30, False, 0),
        properties.Setup(16, 1, 3, 30, True, 0),
    ],
)
@pytest.mark.parametrize("kind", [AheadEngine, MixedAheadEngine])
def test_a_long_history_ahead(setup: properties.Setup, kind: type[AheadEngine]) -> None:
    engine, rng = kind(setup), random.Random(1)
    for _ in range(3000):
        random_operation(engine, rng)
    engine.finish_all()
    counts = engine.counts
    for event, least in (
        ("ahead", 200),
        ("not ahead", 100 if kind is AheadEngine else 10),
        ("rows in vain", 20),
        ("given up", 20),
        ("preemptions", 9),
    ):
        assert counts[event] > least, (event, counts)
    if kind is MixedAheadEngine:
        assert min(counts["prompts ahead"], counts["behind prompts"]) > 15
        if setup.num_blocks == 20:
            assert min(counts["decodes wait"], counts["prompts wait"]) > 15
    if setup.caching and setup.block_size > 1:
        assert counts["shared blocks"] > 100
