"""The engine under load: what a request gets depends on nothing but itself, and whatever happens no block is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from flexmoe import LLM, EngineError, RequestError, RequestOutput, SamplingParams
from flexmoe.engine.detokenizer import Detokenizer
from tests.cpu.serving import GREEDY, WAYS, assert_idle, failing, finish, open_llm, tokens, watched

SEEDED = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=12, ignore_eos=True)
PENALISED = replace(SEEDED, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=4, top_k=20, logprobs=1)
CASES = ("mixtral-window", "qwen2_moe", "llama")


def make_prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 320) for _ in range(rng.randint(1, longest))] for _ in range(count)]


PROMPTS = make_prompts(8)
PARAMS = [(GREEDY, SEEDED, PENALISED)[i % 3] for i in range(len(PROMPTS))]


def alone(llm: LLM, prompts: Sequence[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    """The tokens of each request when no other one is there."""
    pairs = zip(prompts, PARAMS, strict=True)
    return [llm.generate([prompt], params)[0].token_ids for prompt, params in pairs]


def drip(llm: LLM, gap: int) -> list[tuple[int, ...]]:
    """The tokens of each request when one more arrives every `gap` steps."""
    engine, waiting, ids = llm.engine, list(zip(PROMPTS, PARAMS, strict=True)), []
    done: dict[str, RequestOutput] = {}
    while waiting or engine.has_unfinished:
        if waiting:
            ids.append(engine.add_request(*waiting.pop(0)))
        for _ in range(gap):
            done |= {output.request_id: output for output in engine.step()}
        engine.scheduler.check_integrity()
    return tokens([done[request_id] for request_id in ids])


# ------------------------------------------------------------------------------------------------------- companions


@pytest.fixture(scope="module", params=[(case, way) for case in CASES for way in WAYS], ids="-".join)
def expected(request: pytest.FixtureRequest) -> tuple[str, str, list[tuple[int, ...]]]:
    """A model, a way to compute it, and what each request gets alone."""
    case, way = request.param
    with open_llm(case, way, enable_prefix_caching=False) as llm:
        return case, way, alone(llm)


Expected = tuple[str, str, list[tuple[int, ...]]]


def test_every_way_computes_the_same(expected: Expected) -> None:
    case, _, found = expected
    with open_llm(case, "reference", enable_prefix_caching=False) as llm:
        assert alone(llm) == found


def test_together(expected: Expected) -> None:
    case, way, found = expected
    with open_llm(case, way, enable_prefix_caching=False) as llm, watched(llm.engine) as steps:
        assert tokens(llm.generate(PROMPTS, PARAMS)) == found
        assert max(len(step.chunks) for step in steps) == len(PROMPTS)
        assert tokens(llm.generate(PROMPTS[::-1], PARAMS[::-1])) == found[::-1]
        assert drip(llm, 2) == found
        assert_idle(llm)


def test_two_seats(expected: Expected) -> None:
    case, way, found = expected
    with open_llm(case, way, max_num_seqs=2) as llm, watched(llm.engine) as steps:
        assert tokens(llm.generate(PROMPTS, PARAMS)) == found
        assert max(len(step.chunks) for step in steps) == 2
        assert_idle(llm)


def test_chunked_prefill(expected: Expected) -> None:
    case, way, found = expected
    with open_llm(case, way, max_num_batched_tokens=7) as llm, watched(llm.engine) as steps:
        assert tokens(llm.generate(PROMPTS, PARAMS)) == found
        assert sum(not chunk.samples for step in steps for chunk in step.chunks) > 5
        assert any(0 < step.num_decodes < len(step.chunks) for step in steps)
        assert max(step.num_tokens for step in steps) == 7
        assert_idle(llm)


def test_prefix_hits(expected: Expected) -> None:
    case, way, found = expected
    with open_llm(case, way, block_size=4, num_blocks=256) as llm:
        assert tokens(llm.generate(PROMPTS, PARAMS)) == found
        again = llm.generate(PROMPTS, PARAMS)
        assert tokens(again) == found
        # The last token is computed in any case: its logits are wanted.
        assert [output.metrics.num_cached_tokens for output in again] == [(len(p) - 1) // 4 * 4 for p in PROMPTS]
        assert drip(llm, 1) == found
        assert_idle(llm)


@pytest.mark.parametrize("caching", [False, True])
def test_preemption(expected: Expected, caching: bool) -> None:
    """Blocks for the longest request and few more."""
    case, way, found = expected
    options = {"block_size": 4, "num_blocks": 20, "enable_prefix_caching": caching}
    with open_llm(case, way, **options) as llm, watched(llm.engine) as steps:
        assert tokens(llm.generate(PROMPTS, PARAMS)) == found
        assert sum(len(step.preempted) for step in steps) > 1
        assert max(request.num_preemptions for step in steps for request in step.preempted) > 0
        assert_idle(llm)


def test_in_bf16_the_c_kernels_keep_a_request_apart_from_others() -> None:
    """Also from a prompt that is computed in the same step, which torch does with other roundings.

    One prompt comes at a time and is computed whole, as it is alone: the shape of torch's products is the same.
    """
    with open_llm("llama", dtype="bfloat16", enable_prefix_caching=False) as llm:
        found = alone(llm)
        assert drip(llm, 1) == drip(llm, 3) == found
        assert_idle(llm)


def test_two_engines_in_one_process() -> None:
    cases = ("mixtral", "olmoe")
    found = []
    for case in cases:
        with open_llm(case) as llm:
            found.append(alone(llm))
    first, second = (open_llm(case) for case in cases)
    ids: list[list[str]] = [[], []]
    for pair in zip(PROMPTS, PARAMS, strict=True):
        for llm, mine in zip((first, second), ids, strict=True):
            mine.append(llm.engine.add_request(*pair))
    done: list[dict[str, RequestOutput]] = [{}, {}]
    for _ in range(5):
        for llm, outputs in zip((first, second), done, strict=True):
            outputs |= {output.request_id: output for output in llm.engine.step()}
    done[0] |= finish(first.engine)
    first.close()
    done[1] |= finish(second.engine)
    assert [tokens([outputs[i] for i in mine]) for outputs, mine in zip(done, ids, strict=True)] == found
    assert_idle(second)
    second.close()


# ------------------------------------------------------------------------------------------------------------ requests


@pytest.fixture(scope="module", params=["C", "late"])
def shared(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with open_llm(way=request.param, num_blocks=64) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert_idle(shared)


def test_a_step_with_nothing_to_do(llm: LLM) -> None:
    assert llm.engine.step() == []


def test_step_reports_finished_requests_and_streams(llm: LLM) -> None:
    engine = llm.engine
    quiet = engine.add_request([5, 6], replace(GREEDY, max_tokens=3))
    loud = engine.add_request([5, 6], replace(GREEDY, max_tokens=2), stream=True)
    assert engine.serves(quiet)
    reports = [[(output.request_id, output.finished) for output in engine.step()] for _ in range(3)]
    assert reports == [[(loud, False)], [(loud, True)], [(quiet, True)]]
    assert not engine.serves(quiet)


def test_request_ids(llm: LLM) -> None:
    engine = llm.engine
    assert engine.add_request([5], GREEDY, request_id="mine") == "mine"
    with pytest.raises(RequestError, match="request_id='mine' is still being served; use another id"):
        engine.add_request([5], GREEDY, request_id="mine")
    assert list(finish(engine)) == ["mine"]
    assert engine.add_request([5], GREEDY, request_id="mine") == "mine"  # free again
    finish(engine)


@pytest.mark.parametrize("first_is_single", [True, False])
def test_the_id_of_a_sample_is_taken_too(llm: LLM, first_is_single: bool) -> None:
    """Samples are called a, a/1, a/2 by the scheduler."""
    pair: list[tuple[str, SamplingParams]] = [("a/1", GREEDY), ("a", replace(SEEDED, n=3))]
    first, second = pair if first_is_single else pair[::-1]
    llm.engine.add_request([5], first[1], request_id=first[0])
    with pytest.raises(RequestError, match="request_id='a/1' is still being served"):
        llm.engine.add_request([5], second[1], request_id=second[0])
    assert list(finish(llm.engine)) == [first[0]]


def test_a_refused_prompt_leaves_nothing_queued(llm: LLM) -> None:
    for bad in ([], [5] * 500, [5, 10**6], [-1]):
        with pytest.raises(RequestError):
            llm.generate([[5, 6], [7], bad, [8]], GREEDY)
        assert_idle(llm)
    with pytest.raises(RequestError, match="stop_token_ids names token 320"):
        llm.generate([[5], [6]], [GREEDY, replace(GREEDY, stop_token_ids=[320])])
    assert_idle(llm)


# --------------------------------------------------------------------------------------------------------------- abort


@pytest.mark.parametrize("way", ["C", "late"])
@pytest.mark.parametrize("steps", range(8))
def test_abort_at_any_time(steps: int, way: str) -> None:
    """Waiting, between chunks of a prompt, decoding: with neighbours that go on undisturbed."""
    prompts = [[5] * 20, [6] * 3, [7] * 30]
    options: dict[str, Any] = {"max_num_batched_tokens": 9, "max_num_seqs": 2, "block_size": 4, "num_blocks": 24}
    with open_llm(way=way, **options) as llm:
        found = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
        for victim in range(3):
            ids = [llm.engine.add_request(prompt, GREEDY) for prompt in prompts]
            for _ in range(steps):
                assert llm.engine.step() == []
            output = llm.engine.abort(ids[victim])
            llm.engine.scheduler.check_integrity()
            assert output is not None
            assert output.finished
            assert output.outputs[0].finish_reason == "abort"
            assert output.token_ids == found[victim][: len(output.token_ids)]
            assert llm.engine.abort(ids[victim]) is None
            done = finish(llm.engine)
            assert ids[victim] not in done
            assert [done[i].token_ids for i in ids if i in done] == found[:victim] + found[victim + 1 :]
            assert_idle(llm)


def test_abort_ends_every_sample(llm: LLM) -> None:
    request_id = llm.engine.add_request([5, 6], replace(SEEDED, n=4, min_tokens=0, logit_bias={9: 3.0}))
    for _ in range(3):
        llm.engine.step()
    output = llm.engine.abort(request_id)
    assert output is not None
    assert [sample.finish_reason for sample in output.outputs] == ["abort"] * 4
    assert [len(sample.token_ids) for sample in output.outputs] == [3] * 4
    assert all(sample.text for sample in output.outputs)


def test_abort_leaves_finished_samples_as_they_are(llm: LLM) -> None:
    stop = list(range(3, 200))  # likely to end some samples early, and not all
    params = replace(SEEDED, n=8, stop_token_ids=stop, max_tokens=50)
    for seed in range(20):
        request_id = llm.engine.add_request([5, 6], replace(params, seed=seed))
        llm.engine.step()
        output = llm.engine.abort(request_id)
        if output is not None and {sample.finish_reason for sample in output.outputs} == {"stop", "abort"}:
            break
    else:
        pytest.fail("no mixture of finished and unfinished samples was met")


def test_abort_of_a_preempted_request() -> None:
    with open_llm(block_size=4, num_blocks=12) as llm, watched(llm.engine) as steps:
        ids = [llm.engine.add_request([5 + i] * 10, replace(GREEDY, max_tokens=24)) for i in range(3)]
        while not any(step.preempted for step in steps):
            llm.engine.step()
        victim = next(step.preempted[0] for step in steps if step.preempted)
        output = llm.engine.abort(victim.request_id)
        assert output is not None
        assert len(output.token_ids) == victim.num_output_tokens > 0
        assert set(finish(llm.engine)) == set(ids) - {victim.request_id}
        assert_idle(llm)


def test_abort_of_what_is_not_there(llm: LLM) -> None:
    assert llm.engine.abort("nobody") is None


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt(), EngineError("dead")], ids=repr)
def test_an_error_in_the_middle_leaves_the_engine_usable(llm: LLM, step: int, error: BaseException) -> None:
    found = tokens(llm.generate(PROMPTS, PARAMS))
    with failing(llm.engine, step, error), pytest.raises(type(error)):
        llm.generate(PROMPTS, PARAMS)
    assert_idle(llm)
    with failing(llm.engine, step, error), pytest.raises(type(error)):
        list(llm.stream(PROMPTS[0], GREEDY))
    assert_idle(llm)
    assert tokens(llm.generate(PROMPTS, PARAMS)) == found


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_step_that_failed_is_computed_again(llm: LLM, step: int) -> None:
    """Requests of others than the caller's keep their place and lose nothing."""
    found = tokens(llm.generate(PROMPTS, PARAMS))
    ids = [llm.engine.add_request(*pair) for pair in zip(PROMPTS, PARAMS, strict=True)]
    done: dict[str, RequestOutput] = {}
    with failing(llm.engine, step, RuntimeError("no memory")):
        for _ in range(step):
            done |= {output.request_id: output for output in llm.engine.step()}
        with pytest.raises(RuntimeError, match="no memory"):
            llm.engine.step()
        done |= finish(llm.engine)
    assert tokens([done[request_id] for request_id in ids]) == found


def test_an_error_while_reading_text_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it comes again when the request is aborted."""

    def fail(*_: Any) -> str:
        raise RuntimeError("no such token")

    for use in USES:
        with monkeypatch.context() as patch:
            patch.setattr(Detokenizer, "append", fail)
            with pytest.raises(RuntimeError, match="no such token"):
                use(llm)
        assert_idle(llm)


USES: list[Callable[[LLM], Any]] = [
    lambda llm: llm.generate(PROMPTS, GREEDY),
    lambda llm: llm.generate(PROMPTS, replace(GREEDY, stop="never")),
    lambda llm: list(llm.stream(PROMPTS[0], GREEDY)),
    lambda llm: llm.generate(PROMPTS[0], replace(SEEDED, n=3)),
]


@pytest.mark.parametrize("params", [GREEDY, SEEDED, replace(GREEDY, logprobs=2), PENALISED], ids=lambda _: "")
@pytest.mark.parametrize("way", WAYS)
def test_damaged_weights_are_an_error(way: str, params: SamplingParams) -> None:
    """Logits that are not numbers give no token, and no hang."""
    with open_llm("mixtral", way) as llm:
        llm.engine.runner.model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(EngineError, match="are not numbers; the weights may be damaged"):
            llm.generate([[5, 6], [7]], params)
        assert_idle(llm)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("params", [GREEDY, SEEDED, replace(GREEDY, logprobs=2)], ids=lambda _: "")
def test_a_row_without_numbers_ends_its_request_alone(way: str, params: SamplingParams) -> None:
    """One token's embedding is damaged; the request that meets it fails, the others do not notice."""
    with open_llm("mixtral", way, enable_prefix_caching=False) as llm:
        prompts = [[5, 6], [7, 8]]
        expected = [output.token_ids for output in llm.generate(prompts, params)]
        bad = next(t for t in range(9, llm.config.vocab_size) if not any(t in row for row in expected))
        llm.engine.runner.model.embed_tokens.weight.data[bad] = float("nan")
        for i, prompt in enumerate([[5, 6], [7, bad], [7, 8]]):
            llm.engine.add_request(prompt, params, request_id=str(i))
        found = finish(llm.engine)
        assert found["1"].error is not None
        assert "not numbers" in found["1"].error
        assert found["1"].outputs[0].finish_reason == "error"
        assert [found[i].token_ids for i in "02"] == expected
        assert_idle(llm)


def test_a_text_that_cannot_be_made_ends_its_request_alone() -> None:
    with LLM(num_blocks=64) as llm:
        alone = llm.generate("Once upon a time", GREEDY)[0]
        ids = llm.encode("Once upon a time")
        llm.engine.add_request(ids, GREEDY, request_id="good", stream=True)
        llm.engine.add_request(ids, replace(SEEDED, n=2), request_id="bad", stream=True)
        llm.engine.step()
        _, sample = vars(llm.engine)["_owner"]["bad/1"]
        with patch.object(sample.detokenizer, "append", side_effect=ValueError("broken table")):
            found = finish(llm.engine)
        assert found["bad"].error == "request 'bad' failed: broken table"
        assert [s.finish_reason for s in found["bad"].outputs] == ["error", "error"]
        assert found["good"].text == alone.text
        assert_idle(llm)
