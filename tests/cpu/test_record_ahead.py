"""Graphs recorded while nothing else is to do: which, in what order, and that requests come first."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from flexmoe import LLM
from flexmoe.engine import record_ahead
from flexmoe.engine.async_engine import AsyncEngine
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.record_ahead import RecordingAhead
from flexmoe.engine.sampler import SamplingState
from flexmoe.engine.startup import Started
from flexmoe.errors import EngineError
from flexmoe.scheduling.prompt_forms import graph_form
from tests.cpu.serving import GREEDY
from tests.cpu.test_async_engine import jobs


class Seen:
    """In the place of both who record; notes what is asked of them."""

    max_rows = 512

    def __init__(self) -> None:
        self.decodes: list[tuple[int, bool, float, float]] = []
        self.prompts: list[tuple[int, int]] = []
        self.order: list[str] = []

    def record(self, what: Any, chunks: int = 0, *, long: bool | None = None) -> torch.Tensor:
        if long is None:
            self.prompts.append((what, chunks))
            self.order.append("prompt")
            return torch.zeros(chunks, 7)
        states: Sequence[SamplingState] = what
        params = states[0].params
        self.decodes.append((len(states), long, params.temperature, params.top_p))
        self.order.append("long" if long else "few" if len(states) <= 8 else "many")
        return torch.empty(0)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of memory that are free on what passes for a GPU."""
    memory = [8 << 30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory[0], 80 << 30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(record_ahead, "computing_on", lambda device: contextlib.nullcontext())
    return memory


def recording(
    seen: Seen, *, wanted: bool = True, graphs: bool = True, tokens: int = 1024, one_pass: bool = False
) -> RecordingAhead:
    started = Mock(spec=Started, graphed=seen if graphs else None, prompts=seen, device=torch.device("cpu"))
    return RecordingAhead(started, tokens, wanted=wanted, one_pass=one_pass)


@pytest.mark.usefixtures("free")
def test_in_one_pass_prompts_beside_any_number_of_streams_are_recorded() -> None:
    seen = Seen()
    found = recording(seen, one_pass=True, tokens=2304)
    while found.record():
        pass
    for streams, tokens in ((1, 16), (7, 100), (32, 608), (63, 1985)):
        assert graph_form(tokens + streams, streams + 1) in seen.prompts
    assert list(dict.fromkeys(seen.order)) == ["few", "prompt", "many", "long"]
    assert seen.order.index("many") < len(seen.order) - seen.order[::-1].index("prompt") < seen.order.index("long") + 1


@pytest.mark.usefixtures("free")
def test_usual_forms_are_recorded_each_once_and_the_likeliest_first() -> None:
    seen = Seen()
    found = recording(seen)
    while found.record():
        pass
    assert not found.record()
    assert len(set(seen.decodes)) == len(seen.decodes)
    assert len(set(seen.prompts)) == len(seen.prompts)
    assert {rows for rows, *_ in seen.decodes} == {*range(1, 9), 12, 16, 20, 24, 28, 32, 40, 48, 56, 64}
    assert {(long, temperature, top_p) for _, long, temperature, top_p in seen.decodes} == {
        (long, *way) for long in (False, True) for way in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9))
    }
    assert seen.prompts[:3] == [(16, 1), (32, 1), (48, 1)]
    assert {chunks for _, chunks in seen.prompts} == {1, 2, 4}
    assert max(tokens for tokens, _ in seen.prompts) == 1024
    kinds = ["few", "prompt", "many", "long"]
    assert sorted(seen.order, key=kinds.index) == seen.order


@pytest.mark.parametrize("options", [{"wanted": False}, {"graphs": False}], ids=["not wanted", "no graphs"])
def test_nothing_is_recorded(options: dict[str, bool]) -> None:
    seen = Seen()
    assert not recording(seen, **options).record()
    assert not seen.order


def test_some_memory_stays_free(free: list[int]) -> None:
    seen = Seen()
    found = recording(seen)
    assert found.record()
    free[0] = 1 << 30
    assert not found.record()
    free[0] = 8 << 30
    assert not found.record(), "memory that others have needed once, they may need again"
    assert len(seen.order) == 1


@pytest.mark.usefixtures("free")
def test_too_little_memory_ends_the_recording_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    found = recording(seen)
    assert found.record()
    full = Mock(side_effect=torch.OutOfMemoryError("9 GiB"))
    monkeypatch.setattr(seen, "record", full)
    assert not found.record()
    assert not found.record()
    assert full.call_count == 1


def test_a_step_of_padding_has_no_rows() -> None:
    packed = PackedRows(4, 8, torch.device("cpu"))
    packed.load((), (), ())
    assert packed.rows.lengths.tolist() == [0] * 4
    assert packed.rows.sources.tolist() == [-1] * 4
    assert packed.sampling.temperature.tolist() == [0.0] * 4


def test_an_idle_engine_prepares_and_a_request_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has much to prepare, a little at a time; what a request needs is computed between two pieces."""

    async def run() -> None:
        llm = LLM(num_blocks=128, threads=1)
        with_request: list[bool] = []
        left = iter(range(40))

        def prepare() -> bool:
            with_request.append(llm.engine.has_unfinished)
            return next(left, None) is not None

        monkeypatch.setattr(llm.engine, "prepare", prepare)
        monkeypatch.setattr("flexmoe.engine.async_engine._WATCH_SECONDS", 0.01)
        engine = AsyncEngine(llm.engine)
        engine.start()
        try:
            while not with_request:
                await asyncio.sleep(0.001)
            answer = await (await engine.submit(jobs(llm, ["Once upon a time"], GREEDY)))[0].last()
            assert answer.finished
            while len(with_request) < 41:  # and then it goes on, without waiting in between
                await asyncio.sleep(0.001)
            assert not any(with_request)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_preparing_that_hangs_is_told_to_those_who_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        llm, begun, blocked = LLM(num_blocks=128, threads=1), threading.Event(), threading.Event()

        def prepare() -> bool:
            begun.set()
            blocked.wait(60)
            return False

        monkeypatch.setattr(llm.engine, "prepare", prepare)
        monkeypatch.setattr("flexmoe.engine.async_engine._WATCH_SECONDS", 0.01)
        engine = AsyncEngine(llm.engine, step_seconds=0.2)
        engine.start()
        try:
            await asyncio.to_thread(begun.wait)
            with pytest.raises(EngineError, match="the engine hangs"):
                await engine.submit(jobs(llm, ["Once upon a time"], GREEDY))
            blocked.set()
            while engine.hang is not None:
                await asyncio.sleep(0.001)
            monkeypatch.setattr(engine, "_most_seconds", 60.0)  # a busy machine is slow without hanging
            assert (await (await engine.submit(jobs(llm, ["Once upon a time"], GREEDY)))[0].last()).finished
        finally:
            blocked.set()
            await engine.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_engine_prepares_nothing_while_it_serves_or_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(num_blocks=64, threads=1) as llm:
        recorded = Mock(return_value=True)
        monkeypatch.setattr(llm.engine, "_recording", Mock(record=recorded))
        assert llm.engine.prepare()
        monkeypatch.setattr(type(llm.engine._compiling), "busy", property(lambda _: True))
        assert not llm.engine.prepare()
        monkeypatch.undo()
        monkeypatch.setattr(llm.engine, "_recording", Mock(record=recorded))
        llm.engine.add_request([5, 6], GREEDY)
        assert not llm.engine.prepare()
        llm.engine.discard(list(llm.engine._tracked))
    assert not llm.engine.prepare()
    assert recorded.call_count == 1
