"""Steps of prompts as graphs on ranks that add up: what graphs and kernels compute and send is the same.

In Triton's interpreter over gloo; a graph that is replayed does its work again.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.engine import prompt_graphs
from flexmoe.engine.prompt_graphs import GraphedPrompts
from flexmoe.models.fused_prompts import PromptDecoder
from flexmoe.scheduling.prompt_forms import MOST_ON_RANKS
from tests.cpu.rerun_graphs import RerunPool
from tests.cpu.tiny_decoders import CPU
from tests.multi.pool import Pool
from tests.multi.test_fused_ranks import MODELS, share_of
from tests.multi.test_prompts_travel import in_one_process, steps
from tests.multi.worker import PoolWorker

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

TIMES = 2  # launched kernel by kernel, then recorded and replayed


def in_graphs(
    worker: PoolWorker, plan: ParallelPlan, model: ModelConfig
) -> tuple[list[Tensor], list[dict[str, float]], tuple[int, int]]:
    """Logits and bytes sent of the same two steps, each time; and how many graphs there were, and replays."""
    mesh = worker.mesh_of(plan)
    decoder, cache = share_of(model, mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_graphs, "GraphPool", RerunPool)
        prompts = GraphedPrompts(PromptDecoder(decoder, 64, CPU), cache, CPU, mesh.traffic, most_graphed=MOST_ON_RANKS)
    found, sent = [], []
    for _ in range(TIMES):
        mesh.traffic.take()
        for chunks in steps(model, (0, 1, 2)):
            logits = prompts.logits(chunks)
        assert prompts.likeliest is not None
        assert prompts.likeliest.tolist() == logits.argmax(-1).tolist()  # none on ranks without logits
        found.append(logits.clone())
        sent.append(mesh.traffic.take())
    pool: Any = prompts._pool
    return found, sent, (pool.captures, pool.replays)


@pytest.mark.parametrize(
    ("plan", "name"),
    [(ParallelPlan(2), "tied-full-norm"), (ParallelPlan(2, 2), "shared"), (ParallelPlan(4, 2), "plain")],
    ids=["tensor", "expert", "hybrid"],
)
def test_graphs_of_prompts_on_ranks(pools: dict[int, Pool], plan: ParallelPlan, name: str) -> None:
    expected = torch.stack(in_one_process(name))
    ranks = pools[plan.num_ranks].call(in_graphs, plan=plan, model=MODELS[name])
    for rank, (found, sent, (captures, replays)) in enumerate(ranks):
        assert captures == 2
        assert replays == 2 * (TIMES - 1)
        assert sent[0] == sent[1]
        assert sent[0]["combine"] > 0
        assert torch.equal(found[0], found[1])
        for logits in found:
            assert len(logits) == (len(expected) if rank == 0 else 0)
            torch.testing.assert_close(logits, expected[: len(logits)], atol=1e-4, rtol=0)


def kernel_by_kernel(worker: PoolWorker, plan: ParallelPlan, model: ModelConfig) -> list[Tensor]:
    """Logits of the two steps, the first of which has no row whose logits are wanted."""
    mesh = worker.mesh_of(plan)
    decoder, cache = share_of(model, mesh)
    prompts = GraphedPrompts(PromptDecoder(decoder, 64, CPU), cache, CPU, mesh.traffic, most_graphed=0)
    return [prompts.logits(chunks) for chunks in steps(model, (0, 1, 2))]


def test_without_graphs_a_step_that_samples_nothing_ends_early_on_all_ranks(pools: dict[int, Pool]) -> None:
    expected = torch.stack(in_one_process("plain"))
    ranks = pools[2].call(kernel_by_kernel, plan=ParallelPlan(2), model=MODELS["plain"])
    for rank, (none, found) in enumerate(ranks):
        assert none.shape == (0, expected.shape[1])
        assert len(found) == (len(expected) if rank == 0 else 0)
        torch.testing.assert_close(found, expected[: len(found)], atol=1e-4, rtol=0)
