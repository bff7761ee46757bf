"""Small engines for tests: opened on tiny checkpoints by each way of computing, and checked to hold nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from flexmoe import LLM, RequestOutput, SamplingParams
from flexmoe.engine import startup
from flexmoe.engine.engine import Engine
from flexmoe.kernels.cpu import library
from flexmoe.scheduling.step import Step
from tests.cpu.late_device import LateRunner, MixedLateRunner, late_device
from tests.cpu.tiny_models import tiny

# The ways to compute a step: few decodes in C; everything in torch with the CPU's experts; with the reference's; by a
# device that computes late, so that the engine runs ahead. "late, mixed" also takes prompts ahead.
WAYS = ("C", "cpu", "reference", "late")

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def open_llm(case: str = "mixtral", way: str = "C", **options: Any) -> LLM:
    """An engine in fp32 with one thread and 64 blocks of 16 tokens, unless `options` say otherwise."""
    if way == "C" and library.load().library is None:
        pytest.skip(library.load().reason)
    if "kv_cache_memory" not in options:
        options = {"num_blocks": 64, **options}
    options = {"dtype": "float32", "threads": 1, **options}
    if way == "reference":
        return LLM(tiny(case), expert_backend="reference", **options)
    if way == "C":
        return LLM(tiny(case), **options)
    if way in ("late", "late, mixed"):
        with late_device(LateRunner if way == "late" else MixedLateRunner):
            return LLM(tiny(case), **options)
    with patch.object(startup, "why_not_native", lambda *_: "switched off by a test"):
        return LLM(tiny(case), **options)


def assert_idle(llm: LLM) -> None:
    """Nothing is queued, tracked or held, and no block is lost."""
    engine = llm.engine
    engine.scheduler.check_integrity()
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert not engine.has_unfinished
    assert not engine.scheduler.has_unfinished
    assert not vars(engine)["_tracked"]
    assert not vars(engine)["_owner"]
    assert vars(engine)["_ahead"] is None
    assert not vars(llm)["_unseen"]


def tokens(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    """The token ids of every sample of every request, in order."""
    return [sample.token_ids for output in outputs for sample in output.outputs]


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left; the last output of each request."""
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        last |= {output.request_id: output for output in engine.step()}
    return last


def num_ahead(llm: LLM) -> int:
    """Steps that were launched before the tokens of the step before them were known."""
    runner = llm.engine.runner
    assert isinstance(runner, LateRunner)
    return runner.num_ahead


@contextmanager
def watched(engine: Engine) -> Iterator[list[Step]]:
    """Within, collects the steps that the scheduler chooses."""
    steps: list[Step] = []
    schedule = engine.scheduler.schedule

    def watch() -> Step:
        steps.append(schedule())
        return steps[-1]

    with patch.object(engine.scheduler, "schedule", watch):
        yield steps


@contextmanager
def failing(engine: Engine, step: int, error: BaseException) -> Iterator[None]:
    """Within, the runner raises `error` in place of its step number `step`, counted from 0."""
    run, calls = engine.runner.run, iter(range(10**9))

    def fail(*arguments: Any) -> Any:
        if next(calls) == step:
            raise error
        return run(*arguments)

    with patch.object(engine.runner, "run", fail):
        yield
