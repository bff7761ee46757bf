"""The engine behind asyncio: same answers, aborts that leave nothing, failures of one and of all."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from flexmoe import LLM, EngineError, RequestError, RequestFailedError, SamplingParams
from flexmoe.engine.async_engine import AsyncEngine, Job
from tests.cpu.serving import GREEDY, assert_idle, failing

LONG = replace(GREEDY, max_tokens=200)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[AsyncEngine, LLM]]:
    """The built-in model, which must be idle afterwards unless it died."""
    llm = LLM(num_blocks=128, threads=1)
    engine = AsyncEngine(llm.engine, **options)
    engine.start()
    try:
        yield engine, llm
        if engine.error is None:
            await engine.call(lambda: assert_idle(llm))
    finally:
        await engine.close()


def jobs(llm: LLM, texts: Sequence[str], params: SamplingParams, stream: bool = False) -> list[Job]:
    return [Job(f"r{i}", llm.encode(text), params, stream) for i, text in enumerate(texts)]


TEXTS = ["Once upon a time", "The capital of Norway", "In Python"]


def test_answers_are_the_engine_s_and_streams_grow() -> None:
    async def run() -> None:
        async with serving(expert_interval=0.001) as (engine, llm):
            with LLM(num_blocks=128, threads=1) as other:
                expected = [output.text for output in other.generate(TEXTS, LONG)]
            streams = await engine.submit(jobs(llm, TEXTS, LONG, stream=True))
            texts = [output.text async for output in streams[0]]
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
            assert len(texts) > 3
            assert [texts[-1], *[(await stream.last()).text for stream in streams[1:]]] == expected
            metrics = engine.engine.metrics
            assert metrics.generated_tokens == 600
            assert metrics.prompt_tokens == sum(len(llm.encode(text)) for text in TEXTS)
            assert metrics.ttft.count == metrics.e2e.count == metrics.queue.count == metrics.tpot.count == 3
            assert metrics.itl.count == 597
            assert metrics.finished == {"length": 3}
            layers = llm.config.num_layers
            assert set(engine.experts.loads) == set(range(layers))
            assert all(engine.experts.imbalance(layer) >= 1.0 for layer in range(layers))
            assert sum(engine.experts.loads[0].counts) == 2 * engine.experts.loads[0].tokens

    asyncio.run(run())


def test_a_look_ends_with_the_last_request() -> None:
    """However long nobody asks then, that is no time that looking took."""

    async def run() -> None:
        async with serving(expert_interval=1e-9) as (engine, llm):
            (stream,) = await engine.submit(jobs(llm, TEXTS[:1], LONG, stream=True))
            await anext(aiter(stream))
            stream.close()
            await engine.call(lambda: None)
            await asyncio.sleep(0.2)
            assert not engine._looks._left
            assert engine.engine.local_runner.probe is None
            assert engine._looks._least_pause < 20  # of steps of milliseconds, a hundredfold

    asyncio.run(run())


def test_a_look_at_experts_holds_back_no_output() -> None:
    """Each step's output crosses by itself, also while a look of several steps is under way."""

    async def run() -> None:
        async with serving(expert_interval=1e-9, max_output_rate=1e9) as (engine, llm):
            crossed: list[int] = []
            deliver = engine._deliver

            def noted(outputs: Sequence[Any]) -> None:
                crossed.append(len(outputs[0].token_ids))
                deliver(outputs)

            with patch.object(engine, "_deliver", noted), patch("flexmoe.engine.expert_looks._SHARE", 1e9):
                (stream,) = await engine.submit(jobs(llm, TEXTS[:1], LONG, stream=True))
                await stream.last()
            assert crossed == list(range(1, 201))
            assert engine.experts.loads[0].passes > 50

    asyncio.run(run())


@pytest.mark.parametrize(("rate", "reported"), [(1000.0, [True] * 6), (20.0, [True, False, False] * 2)])
def test_outputs_cross_as_often_as_the_rate_allows(rate: float, reported: list[bool]) -> None:
    """A stream of a token each 20 ms: each crosses by itself if so many may, though the next step begins at once."""
    asked: list[bool] = []
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)

    class Slow:
        config = SimpleNamespace(moe=None)

        def step(self, *, report: bool) -> list[str]:
            asked.append(report)
            clock.now += 0.02
            return ["a token"] if report else []

    engine = AsyncEngine(Slow(), max_output_rate=rate)  # type: ignore[arg-type]
    with patch.object(engine, "_tell"), patch("flexmoe.engine.async_engine.time", clock):
        for _ in range(6):
            engine._advance()
    assert asked == reported


def test_a_closed_stream_frees_its_blocks() -> None:
    async def run() -> None:
        async with serving() as (engine, llm):
            for _ in range(20):
                streams = await engine.submit(jobs(llm, TEXTS, LONG, stream=True))
                await anext(streams[0])
                for stream in streams:
                    stream.close()
                    stream.close()
            assert engine.num_streams == 0

    asyncio.run(run())


def test_a_cancelled_submission_leaves_nothing() -> None:
    async def run() -> None:
        async with serving() as (engine, llm):
            for _ in range(20):
                task = asyncio.create_task(engine.submit(jobs(llm, TEXTS, LONG)))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert engine.num_streams == 0

    asyncio.run(run())


def test_all_jobs_of_a_submission_are_queued_or_none() -> None:
    async def run() -> None:
        async with serving() as (engine, llm):
            bad = [*jobs(llm, TEXTS, LONG), Job("bad", [10**6], LONG)]
            with pytest.raises(RequestError, match="outside of the vocabulary"):
                await engine.submit(bad)
            assert engine.num_streams == 0

    asyncio.run(run())


def test_a_request_that_fails_fails_alone() -> None:
    async def run() -> None:
        async with serving() as (engine, llm):
            good, bad = await engine.submit(jobs(llm, TEXTS[:2], LONG, stream=True))
            _, sample = vars(llm.engine)["_owner"][bad.request_id]
            with patch.object(sample.detokenizer, "append", side_effect=ValueError("broken table")):
                with pytest.raises(RequestFailedError, match="broken table"):
                    await bad.last()
                assert (await good.last()).finished

    asyncio.run(run())


@pytest.mark.parametrize("dead", [False, True])
def test_an_engine_that_does_not_end_in_order_is_not_waited_for(
    dead: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        llm = LLM(num_blocks=128, threads=1)
        engine = AsyncEngine(llm.engine)
        engine.start()
        if dead:
            with failing(llm.engine, 1, RuntimeError("out of memory")), pytest.raises(EngineError):
                await (await engine.submit(jobs(llm, TEXTS[:1], LONG)))[0].last()
        close = llm.engine.close
        monkeypatch.setattr(llm.engine, "close", lambda: fail(close))
        await asyncio.wait_for(engine.close(), 60)
        assert ("a rank hangs" in caplog.text) is not dead  # of a dead one it has been said why

    def fail(close: Callable[[], None]) -> None:
        close()
        raise EngineError("a rank hangs")

    asyncio.run(run())


def test_death_is_told_to_all_who_wait_and_to_all_who_come() -> None:
    async def run() -> None:
        deaths: list[EngineError] = []
        async with serving(on_death=deaths.append) as (engine, llm):
            with failing(llm.engine, 5, RuntimeError("out of memory")):
                streams = await engine.submit(jobs(llm, TEXTS, LONG, stream=True))
                for stream in streams:
                    with pytest.raises(EngineError, match="the engine died: RuntimeError: out of memory"):
                        await asyncio.wait_for(stream.last(), 60)
            assert deaths == [engine.error]
            with pytest.raises(EngineError, match="out of memory"):
                await asyncio.wait_for(engine.submit(jobs(llm, TEXTS, LONG)), 60)
            assert engine.num_streams == 0

    asyncio.run(run())


def test_what_does_not_end_in_time_ends_with_an_error() -> None:
    async def run() -> None:
        async with serving() as (engine, llm):
            quick = (await engine.submit([Job("quick", llm.encode("A"), replace(GREEDY, max_tokens=1))]))[0]
            slow = (await engine.submit([Job("slow", llm.encode("B"), replace(GREEDY, max_tokens=900))]))[0]
            step = llm.engine.step
            with patch.object(llm.engine, "step", lambda **options: (time.sleep(0.02), step(**options))[1]):
                await engine.drain(1.0)
            assert (await quick.last()).finished
            with pytest.raises(EngineError, match="shuts down"):
                await slow.last()

    asyncio.run(run())
