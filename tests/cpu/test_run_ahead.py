"""The engine ahead of its device: the same tokens, and whatever happens to a step on its way, nothing is lost."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from flexmoe import LLM, RequestOutput, SamplingParams
from flexmoe.scheduling.scheduler import Scheduler
from tests.cpu.late_device import LateFlight, LateRunner
from tests.cpu.serving import GREEDY, assert_idle, failing, finish, num_ahead, open_llm, tokens, watched
from tests.cpu.test_engine_random import everything_at_once
from tests.cpu.test_interrupt import interrupt

SEEDED = SamplingParams(seed=7, top_p=0.95, max_tokens=15, ignore_eos=True)
# What a device can do by itself; most of them end where nobody expects it.
KINDS = (
    SamplingParams(temperature=0, max_tokens=14),
    SamplingParams(seed=3, max_tokens=20, top_k=20, min_p=0.01),
    SamplingParams(seed=1, n=3, max_tokens=9, stop=["a", "e", "th"]),
    SamplingParams(seed=5, max_tokens=None, stop_token_ids=list(range(3, 30)), min_tokens=3),
    SamplingParams(temperature=0, max_tokens=25, ignore_eos=True),
)
PROMPTS = [[5 + i] * (3 + 4 * i) for i in range(5)]


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with open_llm(way="late", block_size=4, num_blocks=128) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert_idle(shared)


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_the_same_tokens(llm: LLM, kind: int) -> None:
    with open_llm(block_size=4, num_blocks=128) as other:
        expected = other.generate(PROMPTS, KINDS[kind])
    before = num_ahead(llm)
    found = llm.generate(PROMPTS, KINDS[kind])
    assert [[(s.token_ids, s.text, s.finish_reason, s.stop_reason) for s in o.outputs] for o in found] == [
        [(s.token_ids, s.text, s.finish_reason, s.stop_reason) for s in o.outputs] for o in expected
    ]
    assert num_ahead(llm) > before + 2


def test_every_step_but_the_first_is_launched_ahead(llm: LLM) -> None:
    before = num_ahead(llm)
    with watched(llm.engine) as steps:
        llm.generate(PROMPTS, GREEDY)
    assert len(steps) == 1
    assert num_ahead(llm) - before == GREEDY.max_tokens - 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "ahead"),
    [
        ({"logprobs": 0}, 0),
        ({"presence_penalty": 0.5}, 0),
        ({"logit_bias": {9: 1.0}}, 0),
        ({"min_tokens": 5, "ignore_eos": False, "stop_token_ids": [319]}, 6),
        ({"min_tokens": 5}, 11),  # nothing is forbidden
    ],
)
def test_what_needs_the_host_waits_for_it(llm: LLM, options: dict[str, Any], ahead: int) -> None:
    before = num_ahead(llm)
    (output,) = llm.generate([[5, 6, 7]], replace(GREEDY, **options))
    assert len(output.token_ids) == 12
    assert num_ahead(llm) - before == ahead


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("way", ["late", "late, mixed"])
def test_everything_at_once_ahead(seed: int, way: str) -> None:
    everything_at_once(random.Random(seed), KINDS, way)


def test_prompts_are_launched_ahead_and_answers_stay_the_same() -> None:
    options: dict[str, Any] = {"block_size": 4, "num_blocks": 128, "max_num_batched_tokens": 8, "max_num_seqs": 3}
    with open_llm(**options) as other:
        expected = tokens(other.generate(PROMPTS * 2, SEEDED))
    with open_llm(way="late, mixed", **options) as llm:
        assert tokens(llm.generate(PROMPTS * 2, SEEDED)) == expected
        runner = llm.engine.runner
        assert isinstance(runner, LateRunner)
        assert runner.num_mixed_ahead > 5
        assert_idle(llm)


# ------------------------------------------------------------------------------------------------- comings and goings


def test_step_reports_as_it_would_otherwise(llm: LLM) -> None:
    def reports(engine: Any) -> list[list[tuple[str, int, bool]]]:
        found = []
        for i, kind in enumerate(KINDS):
            engine.add_request(PROMPTS[i], kind, request_id=str(i), stream=i % 2 == 0)
        while engine.has_unfinished:
            found.append([(o.request_id, len(o.token_ids), o.finished) for o in engine.step()])
        return found

    with open_llm(block_size=4, num_blocks=128) as other:
        assert reports(llm.engine) == reports(other.engine)


@pytest.mark.parametrize("gap", range(1, 5))
def test_a_newcomer_waits_one_step_at_most(llm: LLM, gap: int) -> None:
    engine = llm.engine
    engine.add_request([5, 6, 7], replace(GREEDY, max_tokens=30))
    for _ in range(gap):
        engine.step()
    newcomer = engine.add_request([8, 9], GREEDY, stream=True)
    reports = [[output.request_id for output in engine.step()] for _ in range(3)]
    assert reports == [[], [newcomer], [newcomer]]
    finish(engine)


@pytest.mark.parametrize("steps", range(1, 5))
def test_an_id_is_used_again_while_its_last_owner_is_computed(llm: LLM, steps: int) -> None:
    """What the device computes for the first is not given to the second."""
    expected = tokens(llm.generate([[8, 9]], SEEDED))[0]
    engine = llm.engine
    other = engine.add_request([4], replace(GREEDY, max_tokens=30))
    engine.add_request([5, 6, 7], GREEDY, request_id="mine")
    for _ in range(steps):
        engine.step()
    engine.abort("mine")
    engine.add_request([8, 9], SEEDED, request_id="mine", stream=True)
    seen: list[RequestOutput] = []
    while engine.has_unfinished:
        seen += [output for output in engine.step() if output.request_id != other]
    assert [output.token_ids for output in seen] == [expected[: i + 1] for i in range(len(expected))]


def test_nothing_stays_on_its_way(llm: LLM) -> None:
    engine = llm.engine
    ids = [engine.add_request([5, 6, 7], GREEDY) for _ in range(2)]
    engine.step()
    assert vars(engine)["_ahead"] is not None
    engine.abort(ids[0])
    assert vars(engine)["_ahead"] is not None
    engine.abort(ids[1])
    assert_idle(llm)
    assert engine.step() == []
    llm.generate([[5, 6, 7]], replace(GREEDY, stop_token_ids=list(range(320))))  # ends while the next step is computed
    assert_idle(llm)


def test_closed_with_a_step_on_its_way() -> None:
    with open_llm(way="late") as llm:
        held = weakref.ref(llm.engine.runner)
        llm.engine.add_request([5, 6, 7], GREEDY)
        llm.engine.step()
        assert vars(llm.engine)["_ahead"] is not None
    gc.collect()
    assert held() is None


# --------------------------------------------------------------------------------------------------------------- errors

PLACES: list[tuple[type, str]] = [
    (LateRunner, "can_run_ahead"),
    (LateRunner, "launch"),
    (LateFlight, "wait"),
    (Scheduler, "schedule_ahead"),
]


def step_on(llm: LLM, done: dict[str, RequestOutput]) -> None:
    """To the end, or to an error."""
    while llm.engine.has_unfinished:
        done |= {output.request_id: output for output in llm.engine.step()}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("no memory"), None], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("call", [0, 1, 2, 5, 6])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda value: getattr(value, "__name__", value))
def test_a_step_that_fails_anywhere_is_computed_again(
    llm: LLM, owner: type, name: str, call: int, error: Exception | None, early: bool
) -> None:
    """Before or after the work of the call. Ctrl-C in bookkeeping ends the requests; elsewhere all go on."""
    expected = tokens(llm.generate(PROMPTS, SEEDED))
    ids = [llm.engine.add_request(prompt, SEEDED) for prompt in PROMPTS]
    done: dict[str, RequestOutput] = {}
    calls, original = iter(range(10**9)), getattr(owner, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        now = next(calls) == call
        result = None if now and early else original(*arguments, **options)
        if now and error:
            raise error
        if now:
            interrupt()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(KeyboardInterrupt if error is None else RuntimeError):
            step_on(llm, done)
    assert vars(llm.engine)["_ahead"] is None
    llm.engine.scheduler.check_integrity()
    done |= finish(llm.engine)
    if owner is Scheduler and error is None:
        assert not done
    else:
        assert tokens([done[request_id] for request_id in ids]) == expected


@pytest.mark.parametrize("name", ["add", "abort"])
def test_ctrl_c_in_bookkeeping_while_a_step_is_on_its_way(llm: LLM, name: str) -> None:
    """All requests end, those of that step too."""
    expected = tokens(llm.generate(PROMPTS, SEEDED))
    ids = [llm.engine.add_request(prompt, SEEDED) for prompt in PROMPTS]
    for _ in range(3):
        llm.engine.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[0], SEEDED) if name == "add" else llm.engine.abort(ids[0])
    assert_idle(llm)
    assert tokens(llm.generate(PROMPTS, SEEDED)) == expected


@pytest.mark.parametrize("step", range(6))
def test_a_device_that_fails_fails_both_steps(llm: LLM, step: int) -> None:
    expected = tokens(llm.generate(PROMPTS, SEEDED))
    ids = [llm.engine.add_request(prompt, SEEDED) for prompt in PROMPTS]
    done: dict[str, RequestOutput] = {}
    with failing(llm.engine, step, RuntimeError("no memory")), pytest.raises(RuntimeError, match="no memory"):
        step_on(llm, done)
    done |= finish(llm.engine)
    assert tokens([done[request_id] for request_id in ids]) == expected


def test_given_up_again_and_again() -> None:
    """A device that computes each step twice, late, while requests come and go in few blocks."""
    rng = random.Random(1)
    with open_llm(way="late", block_size=4, num_blocks=24) as llm:
        expected = tokens(llm.generate(PROMPTS, SEEDED))
        engine, place = llm.engine, dict[str, int]()
        finished = 0
        while finished < 40:
            if rng.random() < 0.4:
                new = rng.randrange(len(PROMPTS))
                place[engine.add_request(PROMPTS[new], SEEDED)] = new
            if rng.random() < 0.05 and place:
                victim = rng.choice(list(place))
                engine.abort(victim)
                del place[victim]
            if rng.random() < 0.3 and engine.has_unfinished:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(LateFlight, "wait", give_up)
                    with pytest.raises(RuntimeError, match="given up"):
                        engine.step()
            for output in engine.step():
                assert output.token_ids == expected[place.pop(output.request_id)]
                finished += 1
            engine.scheduler.check_integrity()
        engine.discard(list(place))
        assert num_ahead(llm) > 50
        assert_idle(llm)


def give_up(_: LateFlight) -> None:
    raise RuntimeError("given up")
