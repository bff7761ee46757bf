"""Steps in the kernels of prompts on ranks whose tokens travel, in Triton's interpreter over gloo, beside one process.

Decodes and prompts are in one step; a data rank may have no rows at all, and computes its experts for the others.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.engine.batch import build_batch
from flexmoe.engine.prompt_graphs import GraphedPrompts
from flexmoe.models.fused_prompts import PromptDecoder
from flexmoe.parallel.mesh import Mesh
from flexmoe.scheduling.step import ScheduledChunk, Step
from tests.cpu.paging import scattered
from tests.cpu.tiny_decoders import CPU, Recording
from tests.multi.pool import Pool
from tests.multi.test_fused_ranks import BLOCK_SIZE, MODELS, share_of
from tests.multi.worker import PoolWorker

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

LENGTHS = (5, 3, 9)  # of three prompts, which take two steps: all but one token, then a decode and two whole prompts
TRAVEL: dict[str, Any] = {"moe_dispatch": "all_to_all"}


def steps(model: ModelConfig, which: tuple[int, ...]) -> list[list[ScheduledChunk]]:
    """Of the requests with these numbers: the first one's prompt, then its next token beside the other prompts."""
    torch.manual_seed(3)
    requests, _ = scattered([length + 1 for length in LENGTHS], BLOCK_SIZE, model.vocab_size)
    first = [ScheduledChunk(requests[0], 0, LENGTHS[0], False)] if 0 in which else []
    decode = [ScheduledChunk(requests[0], LENGTHS[0], 1, True)] if 0 in which else []
    return [first, decode + [ScheduledChunk(requests[i], 0, LENGTHS[i] + 1, True) for i in which if i]]


@functools.cache
def in_one_process(name: str) -> list[Tensor]:
    """Logits of the three requests, in torch."""
    model = MODELS[name]
    decoder, cache = share_of(model, Mesh(ParallelPlan()))
    with torch.inference_mode():
        for chunks in steps(model, (0, 1, 2)):
            batch = build_batch(Step(chunks, 0, []), BLOCK_SIZE, [None], CPU, None)
            hidden = decoder(batch, cache)
        return list(decoder.logits(hidden, batch))


def in_kernels(worker: PoolWorker, plan: ParallelPlan, model: ModelConfig, shares: Any) -> tuple[Tensor, Any, int]:
    """shares: the numbers of each data rank's requests. Logits of this one's, its place, and how many layers it saw."""
    mesh = worker.mesh_of(plan)
    decoder, cache = share_of(model, mesh)
    prompts = GraphedPrompts(PromptDecoder(decoder, 64, CPU), cache, CPU, most_graphed=0)
    seen, all_steps = Recording(), [steps(model, share) for share in shares]
    for number, chunks in enumerate(all_steps[mesh.place.dp]):
        rows = [sum(chunk.num_tokens for chunk in theirs[number]) for theirs in all_steps]
        logits = prompts.logits(chunks, None, seen if chunks else None, max(rows) if len(shares) > 1 else None)
    return logits.clone(), mesh.place, sum(stage == "topk_ids" for stage, _ in seen.stages)


@pytest.mark.parametrize(
    ("plan", "shares"),
    [
        (ParallelPlan(2, 2, **TRAVEL), ((0, 1, 2),)),
        (ParallelPlan(4, 2, **TRAVEL), ((0, 1, 2),)),
        (ParallelPlan(data_parallel_size=2, expert_parallel_size=2), ((0, 2), (1,))),
        (ParallelPlan(data_parallel_size=2, expert_parallel_size=2), ((), (0, 1, 2))),
        (ParallelPlan(data_parallel_size=2, expert_parallel_size=2, **TRAVEL), ((1,), (0, 2))),
        (ParallelPlan(data_parallel_size=2, expert_parallel_size=2, **TRAVEL), ((0, 1, 2), ())),
        (ParallelPlan(2, 2, data_parallel_size=2), ((0, 1), (2,))),
    ],
    ids=["experts", "hybrid", "data", "idle", "data-to-all", "idle-to-all", "data-hybrid"],
)
@pytest.mark.parametrize("name", ["plain", "tied-full-norm", "shared"])
def test_rows_that_travel(pools: dict[int, Pool], plan: ParallelPlan, shares: Any, name: str) -> None:
    expected = in_one_process(name)
    moe_layers = sum(layer.is_moe for layer in MODELS[name].layers)
    ranks = pools[plan.num_ranks].call(in_kernels, plan=plan, model=MODELS[name], shares=shares)
    for logits, place, seen in ranks:
        share = shares[place.dp]
        assert seen == (moe_layers if share else 0)
        sampled = share if place.tp == 0 else ()  # the first of each data rank has all logits
        assert logits.shape == (len(sampled), MODELS[name].vocab_size)
        for found, number in zip(logits, sampled, strict=True):
            torch.testing.assert_close(found, expected[number], atol=1e-4, rtol=0)
