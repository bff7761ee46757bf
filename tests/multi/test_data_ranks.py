"""Data ranks, with requests and caches of their own and shared experts, each beside one process with its requests.

A data rank computes the steps that one process would compute which has the same requests. So its logits and its choices
of experts can be compared step by step, though no two data ranks have the same rows.
"""

from __future__ import annotations

from typing import Any

import pytest

from flexmoe import LLM, SamplingParams
from flexmoe.config.layout import RankLayout
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.shard import Shard
from flexmoe.scheduling import DataRanks
from tests.cpu.tiny_models import tiny
from tests.multi.pool import Pool
from tests.multi.test_models import (
    OPTIONS,
    PLACEMENTS,
    PROMPTS,
    Recording,
    Rounds,
    assert_close,
    assert_same,
    generate,
    seen,
    watch,
)

ROWS = {"moe_dispatch": "all_to_all"}
PLANS: dict[str, dict[str, Any]] = {
    "tensor-2": {"data_parallel_size": 2},
    "expert-2": {"data_parallel_size": 2, "expert_parallel_size": 2},
    "expert-rows-2": {"data_parallel_size": 2, "expert_parallel_size": 2, **ROWS},
    "expert-4": {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 4},
    "hybrid-4": {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2},
    "hybrid-rows-4": {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2, **ROWS},
    "stages-4": {"data_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 2},
}
# Which prompts each of two data ranks gets: with 21, 35 and 7 tokens at most the third one joins the first, which ends
# a step before the second; the fourth finds its beginning in the cache of the first.
SHARES: tuple[Rounds, Rounds] = (((0, 2), (3,)), ((1,), (4,)))
Known = dict[tuple[str, Rounds], Recording]


@pytest.fixture(scope="module")
def known() -> Known:
    return {}


def in_one_process(case: str, rounds: Rounds, known: Known) -> Recording:
    if (case, rounds) not in known:
        with LLM(tiny(case), **OPTIONS) as llm:
            llm.engine.local_runner.probe = known[case, rounds] = Recording()
            generate(llm, rounds)
    return known[case, rounds]


def check(pool: Pool, case: str, known: Known, **options: Any) -> None:
    with LLM(tiny(case), **OPTIONS) as one:
        wanted = generate(one)
    with pool.llm(tiny(case), **OPTIONS, **options) as llm:
        pool.call(watch)
        assert generate(llm) == wanted
        config, found = llm.engine.config, pool.call(seen)
    plan = ParallelPlan(**options)
    layout = RankLayout(plan)
    for number, recording in enumerate(found):
        alone = in_one_process(case, SHARES[layout.coordinates(number).dp], known)
        if number in layout.samplers:
            assert_close(recording.logits, alone.logits)
        layers = Shard(plan, config, number).layers
        assert_same(recording.topk_ids, [(layer, ids) for layer, ids in alone.topk_ids if layer in layers])


@pytest.mark.parametrize("plan", PLANS)
def test_every_strategy(pools: dict[int, Pool], known: Known, plan: str) -> None:
    """With a shared expert; chunked prompts, an idle data rank, a prefix found by one of them."""
    check(pools[int(plan[-1])], "qwen2_moe", known, **PLANS[plan])


@pytest.mark.parametrize(("case", "plan"), [("olmoe-odd", "hybrid-4"), ("qwen3_moe-odd", "stages-4")])
def test_other_families(pools: dict[int, Pool], known: Known, case: str, plan: str) -> None:
    check(pools[int(plan[-1])], case, known, **PLANS[plan])


def test_a_model_without_experts(pools: dict[int, Pool], known: Known) -> None:
    check(pools[2], "llama-tied-llama3", known, **PLANS["tensor-2"])


@pytest.mark.parametrize("plan", ["expert-2", "expert-rows-2"])
def test_placements(pools: dict[int, Pool], known: Known, plan: str) -> None:
    """Uneven ones, with replicas."""
    first, second = (ExpertPlacement(6, slots) for slots in PLACEMENTS[6, 2])
    check(pools[2], "qwen2_moe", known, **PLANS[plan], placements={1: first, None: second})


@pytest.mark.parametrize("plan", ["expert-rows-2", "hybrid-4"])
def test_full_caches_and_aborts(pools: dict[int, Pool], plan: str) -> None:
    """Blocks for one long request and a half on each data rank: some are preempted, one is aborted on its way."""
    options = {**OPTIONS, "num_blocks": 12, "max_model_len": 40}
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [[30 + i, *PROMPTS[0][: 5 + i]] for i in range(8)]
    with LLM(tiny("qwen2_moe"), **options) as one:
        wanted = [output.token_ids for output in one.generate(prompts, params)]
    with pools[int(plan[-1])].llm(tiny("qwen2_moe"), **options, **PLANS[plan]) as llm:
        engine = llm.engine
        names = [engine.add_request(prompt, params) for prompt in prompts]
        requests = [engine._owner[name][1].request for name in names]
        found: dict[str, tuple[int, ...]] = {}
        while engine.has_unfinished:
            found |= {output.request_id: output.token_ids for output in engine.step()}
            engine.scheduler.check_integrity()
            if requests[1].num_output_tokens == 4 and engine.serves(names[1]):
                aborted = engine.abort(names[1])
                assert aborted is not None
                assert aborted.token_ids == wanted[1][:4]
        assert [found[name] for name in (names[0], *names[2:])] == [wanted[0], *wanted[2:]]
        assert isinstance(engine.scheduler, DataRanks)
        for own in engine.scheduler.schedulers:
            assert own.blocks.num_free == own.blocks.num_blocks
        preempted = sum(request.num_preemptions for request in requests)
    assert preempted > 0


def test_samples_and_sampling(pools: dict[int, Pool]) -> None:
    """The samples of one request go to different data ranks; seeds and log-probabilities are those of one process."""
    params = [
        SamplingParams(temperature=0.9, n=3, max_tokens=6),
        SamplingParams(temperature=1.0, repetition_penalty=1.3, logprobs=2, max_tokens=7),
    ]
    with (
        LLM(tiny("qwen2_moe"), **OPTIONS) as one,
        pools[2].llm(tiny("qwen2_moe"), **OPTIONS, **PLANS["expert-2"]) as llm,
    ):
        for ours, theirs in zip(llm.generate(PROMPTS[:2], params), one.generate(PROMPTS[:2], params), strict=True):
            assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
            assert [len(o.logprobs or ()) for o in ours.outputs] == [len(o.logprobs or ()) for o in theirs.outputs]


def test_recording_counts_each_row_once(pools: dict[int, Pool]) -> None:
    options = {**OPTIONS, "enable_prefix_caching": False}
    with LLM(tiny("qwen2_moe"), **options) as one, one.record_routing() as alone:
        generate(one)
    with pools[4].llm(tiny("qwen2_moe"), **options, **PLANS["stages-4"]) as llm, llm.record_routing() as ranks:
        generate(llm)
    wanted = [(load.layer, load.counts, load.tokens) for load in alone.loads()]
    assert [(load.layer, load.counts, load.tokens) for load in ranks.loads()] == wanted


def test_bytes_of_a_step(pools: dict[int, Pool]) -> None:
    """One prompt of 9 tokens; the other data rank has no rows, and sends padding and sums only."""
    options = {**OPTIONS, **PLANS["hybrid-4"], "max_num_batched_tokens": 64}
    with pools[4].llm(tiny("mixtral"), **options) as llm:
        llm.engine.runner.traffic()  # type: ignore[union-attr]
        llm.generate([[*range(9)]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        sent = llm.engine.runner.traffic()  # type: ignore[union-attr]
    rows, layers = 9 * 64 * 4, 2
    gathered = {"dispatch": layers * rows, "routing": layers * 9 * 8 * 2}
    own = {**gathered, "embedding": rows, "linear": layers * rows, "combine": layers * 2 * rows}
    assert sent[0] == {**own, "logits": 0}
    assert sent[1] == {**own, "logits": 160 * 4}
    assert sent[2] == sent[3] == {**gathered, "embedding": 0, "linear": 0, "combine": layers * rows}
