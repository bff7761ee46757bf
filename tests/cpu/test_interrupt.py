"""Ctrl-C while generating: whenever it comes, nothing is left queued, no block is lost, the next answer is right."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from flexmoe import LLM, EngineError
from flexmoe.engine.tracking import Sample
from flexmoe.scheduling.block_manager import BlockManager
from flexmoe.scheduling.scheduler import Scheduler
from tests.cpu.serving import GREEDY, assert_idle, open_llm, tokens

PROMPTS = [[5 + i] * (3 + 4 * i) for i in range(6)]


@pytest.fixture(scope="module", params=["C", "late"])
def shared(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Few blocks and small steps, so that a run is full of bookkeeping: preemption, chunks, hits, eviction."""
    with open_llm(way=request.param, block_size=4, num_blocks=20, max_num_batched_tokens=16) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    found = tokens(shared.generate(PROMPTS, GREEDY))
    yield shared
    assert_idle(shared)
    assert tokens(shared.generate(PROMPTS, GREEDY)) == found


def interrupt(*_: object) -> None:
    """As the terminal does it: Python raises KeyboardInterrupt at its next instruction."""
    signal.raise_signal(signal.SIGINT)


PLACES: list[tuple[type, str]] = [
    (BlockManager, "allocate"),
    (BlockManager, "grow"),
    (BlockManager, "expect"),
    (BlockManager, "register"),
    (BlockManager, "free"),
    (Scheduler, "add"),
    (Scheduler, "schedule"),
    (Scheduler, "update"),
    (Sample, "read"),
]


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("call", [0, 1, 4])
def test_in_the_middle_of_bookkeeping(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int
) -> None:
    original = getattr(owner, name)
    calls = iter(range(10**9))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if next(calls) == call:
            interrupt()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)


def test_a_stream_that_shared_the_cache_ends_with_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not go on with blocks that may be another's."""
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(BlockManager, "free", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
    with pytest.raises(EngineError, match="was aborted while its output was awaited"):
        list(stream)


# Python tells of an exception in a finalizer, and goes on: the answer is complete then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_at_any_time(llm: LLM) -> None:
    """A timer that rings at a random moment of the run, again and again. The quickest run shows how long one takes."""
    duration = 10.0
    before = signal.signal(signal.SIGALRM, interrupt)
    rng = random.Random(0)
    interrupts = 0
    try:
        while interrupts < 30:
            try:
                start = time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, duration * rng.uniform(0.01, 1))
                llm.generate(PROMPTS, GREEDY)
                signal.setitimer(signal.ITIMER_REAL, 0)
                duration = min(duration, time.perf_counter() - start)
            except KeyboardInterrupt:
                interrupts += 1
            llm.engine.scheduler.check_integrity()
            assert not llm.engine.has_unfinished
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    vars(llm)["_unseen"].clear()  # the note of a request that had finished is left, if the very last instruction is hit
