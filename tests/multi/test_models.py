"""Whole models on 2 and 4 ranks beside one process: logits within 1e-4, the same routing, the same greedy text.

Prompts are computed in chunks, some begin alike (so that blocks are shared), and there are fewer rows than ranks in
many steps. Every strategy runs on a model with a shared expert; every kind of parameter is cut in some model.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe import LLM, SamplingParams
from flexmoe.config.layout import RankLayout
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.shard import Shard
from tests.cpu.tiny_models import tiny
from tests.multi.pool import Pool
from tests.multi.worker import PoolWorker

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "threads": 1, "max_model_len": 64, "num_blocks": 40, "block_size": 4,
    "max_num_batched_tokens": 16, "expert_backend": "reference",
}  # fmt: skip
PREFIX = [7, 30, 31, 99, 5, 5, 200, 11, 12, 13, 14, 15]
PROMPTS = [[*PREFIX, 40, 41, 42], [*range(20, 49)], [9], [*PREFIX, 40, 77], [3, 4]]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PLANS: dict[str, dict[str, Any]] = {
    "tensor-2": {"tensor_parallel_size": 2},
    "expert-2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    "tensor-rows-2": {"tensor_parallel_size": 2, "moe_dispatch": "all_to_all"},
    "expert-rows-2": {"tensor_parallel_size": 2, "expert_parallel_size": 2, "moe_dispatch": "all_to_all"},
    "tensor-4": {"tensor_parallel_size": 4},  # 2 key heads: each on two ranks
    "expert-4": {"tensor_parallel_size": 4, "expert_parallel_size": 4},
    "hybrid-4": {"tensor_parallel_size": 4, "expert_parallel_size": 2},
    "hybrid-rows-4": {"tensor_parallel_size": 4, "expert_parallel_size": 2, "moe_dispatch": "all_to_all"},
    "stages-2": {"pipeline_parallel_size": 2},
    "stages-tensor-4": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
    "stages-expert-rows-4": {
        "pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2, "moe_dispatch": "all_to_all",
    },
}  # fmt: skip
# Experts of uneven counts, one rank with none, replicas on one rank and on several: by experts and expert ranks.
PLACEMENTS = {
    (6, 2): [((4,), (0, 1, 5, 3, 2)), ((0, 1, 2, 3, 0, 0), (0, 5, 4, 3))],
    (6, 4): [((), (0, 1, 2), (5,), (4, 3)), ((0, 1), (2, 0, 3, 0), (4, 5), (0, 3))],
}


class Recording:
    """A probe that keeps choices of experts, and logits."""

    def __init__(self) -> None:
        self.topk_ids: list[tuple[int, Tensor]] = []  # with their layers
        self.logits: list[Tensor] = []

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        if stage == "topk_ids" and len(tensor):
            self.topk_ids.append((layer, tensor.clone()))
        elif stage == "logits" and len(tensor):
            self.logits.append(tensor.clone())


def watch(worker: PoolWorker) -> None:
    assert worker.runner is not None
    assert gc.get_freeze_count() > 0, "a collection halts all ranks: what was loaded is left out"
    worker.runner.probe = Recording()


def seen(worker: PoolWorker) -> Recording:
    assert worker.runner is not None
    assert isinstance(worker.runner.probe, Recording)
    return worker.runner.probe


Computed = tuple[list[tuple[int, ...]], list[int], Recording]


Rounds = tuple[tuple[int, ...], ...]
ROUNDS: Rounds = ((0, 1, 2), (3, 4))


def generate(llm: LLM, rounds: Rounds = ROUNDS) -> tuple[list[tuple[int, ...]], list[int]]:
    """Tokens of prompts, of which the fourth comes when the first has filled blocks that it can share."""
    outputs = [output for numbers in rounds for output in llm.generate([PROMPTS[n] for n in numbers], PARAMS)]
    return [o.token_ids for o in outputs], [o.metrics.num_cached_tokens for o in outputs]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def alone() -> dict[str, Computed]:
    return {}


def in_one_process(case: str, known: dict[str, Computed]) -> Computed:
    if case not in known:
        with LLM(tiny(case), **OPTIONS) as llm:
            llm.engine.local_runner.probe = recording = Recording()
            known[case] = (*generate(llm), recording)
    return known[case]


def check(pool: Pool, case: str, known: dict[str, Computed], **options: Any) -> None:
    tokens, cached, wanted = in_one_process(case, known)
    with pool.llm(tiny(case), **OPTIONS, **options) as llm:
        pool.call(watch)
        assert generate(llm) == (tokens, cached)
        config, found = llm.engine.config, pool.call(seen)
    assert max(cached) > 0
    plan = ParallelPlan(**options)
    for number, rank in enumerate(found):
        if number in RankLayout(plan).samplers:
            assert_close(rank.logits, wanted.logits)
        layers = Shard(plan, config, number).layers
        assert_same(rank.topk_ids, [(layer, ids) for layer, ids in wanted.topk_ids if layer in layers])


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-4, rtol=0)


def assert_same(ours: list[tuple[int, Tensor]], theirs: list[tuple[int, Tensor]]) -> None:
    assert [layer for layer, _ in ours] == [layer for layer, _ in theirs]
    assert all(torch.equal(our, their) for (_, our), (_, their) in zip(ours, theirs, strict=True))


def size_of(plan: str) -> int:
    return int(plan[-1])


@pytest.mark.parametrize("plan", PLANS)
def test_every_strategy(pools: dict[int, Pool], alone: dict[str, Computed], plan: str) -> None:
    check(pools[size_of(plan)], "qwen2_moe", alone, **PLANS[plan])


@pytest.mark.parametrize("case", ["mixtral-window", "olmoe", "olmoe-odd", "qwen3_moe-odd", "qwen3_moe-window"])
@pytest.mark.parametrize("plan", ["hybrid-4", "expert-rows-2"])
def test_every_moe_family(pools: dict[int, Pool], alone: dict[str, Computed], case: str, plan: str) -> None:
    check(pools[size_of(plan)], case, alone, **PLANS[plan])


@pytest.mark.parametrize("case", ["llama-mha-bias", "llama-tied-llama3", "qwen2-window", "qwen3-odd"])
@pytest.mark.parametrize("plan", ["tensor-2", "tensor-4", "stages-2"])
def test_models_without_experts(pools: dict[int, Pool], alone: dict[str, Computed], case: str, plan: str) -> None:
    check(pools[size_of(plan)], case, alone, **PLANS[plan])


@pytest.mark.parametrize("plan", ["expert-2", "expert-rows-2", "expert-4", "hybrid-4", "hybrid-rows-4"])
def test_placements(pools: dict[int, Pool], alone: dict[str, Computed], plan: str) -> None:
    """One for layer 1, another for all the others."""
    degree = PLANS[plan]["expert_parallel_size"]
    first, second = (ExpertPlacement(6, slots) for slots in PLACEMENTS[6, degree])
    options = {**PLANS[plan], "placements": {1: first, None: second}}
    check(pools[size_of(plan)], "qwen2_moe", alone, **options)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_both_layouts_of_checkpoints(pools: dict[int, Pool], layout: Any) -> None:
    options = {**OPTIONS, **PLANS["hybrid-4"]}
    with LLM(tiny("qwen2_moe"), **OPTIONS) as one, pools[4].llm(tiny("qwen2_moe", layout=layout), **options) as llm:
        assert generate(llm) == generate(one)


@pytest.mark.parametrize("plan", ["expert-2", "hybrid-4", "stages-2"])
def test_dummy_weights_are_those_of_one_process(pools: dict[int, Pool], plan: str) -> None:
    options = {**OPTIONS, "load_format": "dummy"}
    with (
        LLM(tiny("mixtral"), **options) as one,
        pools[size_of(plan)].llm(tiny("mixtral"), **options, **PLANS[plan]) as llm,
    ):
        assert generate(llm) == generate(one)


def test_sampling_is_that_of_one_process(pools: dict[int, Pool]) -> None:
    """Seeds, penalties, log-probabilities and several samples go to the rank that samples."""
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=8, ignore_eos=True),
        SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=3, max_tokens=8),
        SamplingParams(temperature=0, logit_bias={5: 4.0}, min_tokens=3, max_tokens=6),
        SamplingParams(temperature=0.7, n=3, max_tokens=5),
        SamplingParams(temperature=0, stop=["e"], max_tokens=8),
    ]
    with (
        LLM(tiny("qwen2_moe"), **OPTIONS) as one,
        pools[2].llm(tiny("qwen2_moe"), **OPTIONS, **PLANS["expert-2"]) as llm,
    ):
        for ours, theirs in zip(llm.generate(PROMPTS, params), one.generate(PROMPTS, params), strict=True):
            assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
            assert [o.text for o in ours.outputs] == [o.text for o in theirs.outputs]
            assert [o.finish_reason for o in ours.outputs] == [o.finish_reason for o in theirs.outputs]
        lines = llm.generate(PROMPTS[0], params[1])[0].outputs[0].logprobs
        assert lines is not None


def test_bfloat16(pools: dict[int, Pool]) -> None:
    """Rounding differs, so only that it runs, on weights in their own format."""
    options = {**OPTIONS, "dtype": "bfloat16"}
    with pools[2].llm(tiny("qwen2_moe", dtype="bfloat16"), **options, **PLANS["expert-rows-2"]) as llm:
        assert all(len(tokens) == 6 for tokens in generate(llm)[0])


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_a_step(pools: dict[int, Pool], size: int) -> None:
    """One prompt of 9 tokens, one new: the sums over layers and steps are the formulas' to the byte."""
    options = {**OPTIONS, "tensor_parallel_size": size, "expert_parallel_size": size, "max_num_batched_tokens": 64}
    with pools[size].llm(tiny("mixtral"), **options) as llm:
        llm.engine.runner.traffic()  # type: ignore[union-attr]
        llm.generate([[*range(9)]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        sent = llm.engine.runner.traffic()  # type: ignore[union-attr]
    all_reduce = 2 * (size - 1) * 9 * 64 * 4 / size
    for rank, found in enumerate(sent):
        assert found == {
            "embedding": all_reduce,
            "linear": 2 * all_reduce,  # attention of both layers
            "combine": 2 * all_reduce,
            "logits": 320 // size * 4 if rank else 0,
        }


def test_bytes_between_stages(pools: dict[int, Pool]) -> None:
    """T H b from each rank to its like in the next stage, on top of what a stage's ranks send each other."""
    options = {**OPTIONS, **PLANS["stages-tensor-4"], "max_num_batched_tokens": 64}
    with pools[4].llm(tiny("mixtral"), **options) as llm:
        llm.engine.runner.traffic()  # type: ignore[union-attr]
        llm.generate([[*range(9)]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        sent = llm.engine.runner.traffic()  # type: ignore[union-attr]
    rows = 9 * 64 * 4
    layer = {"linear": rows, "combine": rows}  # an all-reduce over two: 2 (P-1)/P; one layer a stage
    assert sent[0] == sent[1] == {"embedding": rows, **layer, "stage": rows}
    assert sent[2] == {"stage": 0, **layer, "logits": 0}
    assert sent[3] == {"stage": 0, **layer, "logits": 160 * 4}
