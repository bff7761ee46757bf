"""The Triton decode step on ranks, in Triton's interpreter over gloo, beside one process: tokens, logits, counts.

Three steps from an empty cache; the second and the third begin with tokens that only the devices know, the third draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.routing import LayerLoad
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.kernels.triton.tiles import Limit, TileTable, expert_work
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import Sampling
from flexmoe.models.fused import FusedDecoder
from flexmoe.models.loader import fill_dummy
from flexmoe.moe.load import ExpertCounter
from flexmoe.parallel.mesh import Mesh
from flexmoe.scheduling.scheduler import ScheduledChunk
from tests.cpu.paging import scattered
from tests.cpu.tiny_decoders import CPU, config
from tests.multi.pool import Pool
from tests.multi.worker import PoolWorker

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

ROWS, BUCKET, STEPS, BLOCK_SIZE = 3, 4, 3, 4
SHARED: dict[str, Any] = {"shared_width": 16, "shared_gate": True}
TWO_OF_MOE = (LayerConfig(is_moe=True), LayerConfig(is_moe=True))
MODELS = {
    "plain": config(vocab_size=51),  # the second rank has a word less
    "tied-full-norm": config({"qk_norm": "full"}, tie_embeddings=True, layers=TWO_OF_MOE),
    "shared": config({"qkv_bias": True, "out_bias": True}, SHARED, layers=TWO_OF_MOE),
}
UNEVEN = ((4,), (0, 1, 5, 3, 2))
REPLICAS = ((0, 1, 2, 3, 0, 0), (0, 5, 4, 3))
ON_ONE = ((), (5, 4, 3, 2, 1, 0))


@dataclass
class Decoded:
    """What one rank saw in all steps. sent: bytes by label."""

    tokens: list[list[int]]
    logits: list[Tensor]
    topk_ids: list[Tensor]
    loads: list[LayerLoad]
    sent: dict[str, float]


class Recording:
    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.topk_ids: list[Tensor] = []

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        if stage in ("topk_ids", "logits"):
            getattr(self, stage).append(tensor[:ROWS].clone())


def make(model: ModelConfig, mesh: Mesh, grouped: bool) -> tuple[Decoder, FusedDecoder, KVCache]:
    """This rank's share of a model with dummy weights. grouped: rows of one expert together, however few."""
    decoder = Decoder(model, mesh.plan, "reference", 64, dtype=torch.float32, device=CPU, mesh=mesh).eval()
    fill_dummy({name: p.data for name, p in decoder.named_parameters()}, 7, torch.float32, mesh.shard(model))
    decoder.pack(in_place=True)
    local = mesh.shard(model).local
    assert local.moe is not None
    work = expert_work("expert_gemv", torch.float32, model.hidden_size, local.moe)
    fused = FusedDecoder(decoder, 64, CPU, TileTable((), (Limit(work, 0 if grouped else 8),)), max_rows=8)
    return decoder, fused, KVCache(local, 40, BLOCK_SIZE, torch.float32, CPU)


@torch.inference_mode()
def decode(mesh: Mesh, model: ModelConfig, grouped: bool, probed: bool) -> Decoded:
    torch.manual_seed(1)
    decoder, fused, cache = make(model, mesh, grouped)
    requests, _ = scattered([1] * ROWS, BLOCK_SIZE, model.vocab_size)
    states = [SamplingState(SamplingParams(temperature=0.9, top_k=20), seed) for seed in range(ROWS)]
    probe, counter, found = Recording(), ExpertCounter(model, CPU), []
    packed = PackedRows(BUCKET, 32, CPU)
    order = list(range(ROWS))
    for number in range(STEPS):
        chunks = [ScheduledChunk(requests[r], number, 1, True) for r in order]
        sources = [-1] * ROWS if number == 0 else [1, 2, 0]
        order = order if number == 0 else [order[s] for s in sources]
        chunks = [ScheduledChunk(requests[r], number, 1, True) for r in order]
        draws = number == STEPS - 1
        packed.load(chunks, sources, states if draws else (), ahead=number)
        sampling = Sampling(packed.sampling, filtered=True) if draws else None
        fused.step(packed.rows, sampling, cache, probe if probed else None, counter=counter)
        counter.passed(ROWS)
        found.append(fused.sampled[:ROWS].tolist())
    assert decoder.mesh is mesh
    return Decoded(found, probe.logits, probe.topk_ids, counter.loads("m"), mesh.traffic.take())


def decode_share(worker: PoolWorker, plan: ParallelPlan, **how: Any) -> Decoded:
    return decode(worker.mesh_of(plan), **how)


def check(pool: Pool, plan: ParallelPlan, name: str, *, grouped: bool) -> None:
    how: dict[str, Any] = {"model": MODELS[name], "grouped": grouped, "probed": True}
    wanted = decode(Mesh(ParallelPlan()), **how)
    for found in pool.call(decode_share, plan=plan, **how):
        assert found.tokens == wanted.tokens
        assert found.loads == wanted.loads
        for ours, theirs in zip(found.logits, wanted.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        for ours, theirs in zip(found.topk_ids, wanted.topk_ids, strict=True):
            assert torch.equal(ours, theirs)


def placed(slots: tuple[tuple[int, ...], ...]) -> ParallelPlan:
    return ParallelPlan(2, 2, placements={None: ExpertPlacement(6, slots)})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", [ParallelPlan(2), ParallelPlan(2, 2)], ids=["tensor", "expert"])
def test_both_strategies(pools: dict[int, Pool], plan: ParallelPlan, name: str) -> None:
    check(pools[2], plan, name, grouped=plan.expert_parallel_size > 1)


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize("slots", [UNEVEN, REPLICAS, ON_ONE], ids=["uneven", "replicas", "on_one"])
def test_placements(pools: dict[int, Pool], slots: tuple[tuple[int, ...], ...], grouped: bool) -> None:
    check(pools[2], placed(slots), "shared", grouped=grouped)


def test_hybrid(pools: dict[int, Pool]) -> None:
    """Two key heads on four ranks, too."""
    check(pools[4], ParallelPlan(4, 2), "shared", grouped=False)


def test_bytes_are_those_of_the_formulas(pools: dict[int, Pool]) -> None:
    """Of the bucket's rows; greedy ones exchange a candidate of 8 bytes each, drawn ones all logits in fp32."""
    model, plan = MODELS["plain"], ParallelPlan(2, 2)
    all_reduce = STEPS * BUCKET * model.hidden_size * 4
    for found in pools[2].call(decode_share, plan=plan, model=model, grouped=False, probed=False):
        assert found.sent == {
            "embedding": all_reduce,
            "linear": 3 * all_reduce,  # attention of both layers, and a dense feed-forward
            "combine": all_reduce,
            "logits": (STEPS - 1) * BUCKET * 8 + BUCKET * 26 * 4,
        }
