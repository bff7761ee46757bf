"""The Triton decode step on ranks, in Triton's interpreter over gloo, beside one process: tokens, logits, counts.

Two steps from an empty cache: the first is greedy, the second begins with tokens that only the devices know, and draws.
"""

from __future__ import annotations

import functools
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
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import Sampling
from flexmoe.models.fused import FusedDecoder
from flexmoe.models.loader import fill_dummy
from flexmoe.moe.load import ExpertCounter
from flexmoe.parallel.mesh import Mesh
from flexmoe.scheduling.step import ScheduledChunk
from tests.cpu.paging import scattered
from tests.cpu.tiny_decoders import CPU, config
from tests.kernels.coarse import Coarse
from tests.multi.pool import Pool
from tests.multi.worker import PoolWorker

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

ROWS, BUCKET, STEPS, BLOCK_SIZE = 3, 4, 2, 4
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


def share_of(model: ModelConfig, mesh: Mesh) -> tuple[Decoder, KVCache]:
    """This rank's share of a model with dummy weights."""
    decoder = Decoder(model, mesh.plan, "reference", 64, dtype=torch.float32, device=CPU, mesh=mesh).eval()
    fill_dummy({name: p.data for name, p in decoder.named_parameters()}, 7, torch.float32, mesh.shard(model))
    decoder.pack(in_place=True)
    return decoder, KVCache(mesh.shard(model).local, 40, BLOCK_SIZE, torch.float32, CPU)


def decode(mesh: Mesh, model: ModelConfig, grouped: bool) -> Decoded:
    torch.manual_seed(1)
    decoder, cache = share_of(model, mesh)
    fused = FusedDecoder(decoder, 64, CPU, Coarse(grouped), max_rows=BUCKET)
    requests, _ = scattered([1] * ROWS, BLOCK_SIZE, model.vocab_size)
    states = [SamplingState(SamplingParams(temperature=0.9, top_k=20), seed) for seed in range(ROWS)]
    probe, counter, tokens = Recording(), ExpertCounter(model, CPU), []
    packed = PackedRows(BUCKET, 32, CPU)
    for number, order, sources in ((0, [0, 1, 2], [-1, -1, -1]), (1, [1, 2, 0], [1, 2, 0])):
        chunks = [ScheduledChunk(requests[row], number, 1, True) for row in order]
        packed.load(chunks, sources, states if number else ())
        sampling = Sampling(packed.sampling, filtered=True) if number else None
        with torch.inference_mode():
            fused.step(packed.rows, sampling, cache, probe, counter=counter)
        counter.passed(ROWS)
        tokens.append(fused.sampled[:ROWS].tolist())
    return Decoded(tokens, probe.logits, probe.topk_ids, counter.loads("m"), mesh.traffic.take())


def decode_share(worker: PoolWorker, plan: ParallelPlan, **how: Any) -> Decoded:
    return decode(worker.mesh_of(plan), **how)


@functools.cache
def in_one_process(name: str, grouped: bool) -> Decoded:
    found = decode(Mesh(ParallelPlan()), MODELS[name], grouped)
    eager = ExpertCounter(
        MODELS[name], CPU
    )  # the counts of the step itself are those that a probe makes of its choices
    layers = [load.layer for load in found.loads]
    for number, ids in enumerate(found.topk_ids):
        eager.record("topk_ids", layers[number % len(layers)], ids)
    assert found.loads == eager.loads("m")
    assert not found.sent
    return found


def check(pool: Pool, plan: ParallelPlan, name: str, *, grouped: bool) -> list[Decoded]:
    wanted = in_one_process(name, grouped)
    ranks = pool.call(decode_share, plan=plan, model=MODELS[name], grouped=grouped)
    for found in ranks:
        assert found.tokens == wanted.tokens
        assert found.loads == wanted.loads
        for ours, theirs in zip(found.logits, wanted.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert all(map(torch.equal, found.topk_ids, wanted.topk_ids))
    return ranks


@pytest.mark.parametrize("name", ["tied-full-norm", "shared"])
def test_slices(pools: dict[int, Pool], name: str) -> None:
    check(pools[2], ParallelPlan(2), name, grouped=False)


@pytest.mark.parametrize(
    ("slots", "grouped"), [(UNEVEN, True), (REPLICAS, True), (REPLICAS, False), (ON_ONE, False)],
    ids=["uneven", "replicas", "replicas-alone", "on-one"],
)  # fmt: skip
def test_placements(pools: dict[int, Pool], slots: tuple[tuple[int, ...], ...], grouped: bool) -> None:
    placement = ExpertPlacement(6, slots)
    check(pools[2], ParallelPlan(2, 2, placements={None: placement}), "shared", grouped=grouped)


def test_whole_experts_and_the_bytes_of_the_formulas(pools: dict[int, Pool]) -> None:
    """Of the bucket: greedy rows exchange a candidate of 8 bytes each, drawn ones, and probes, logits in fp32."""
    model = MODELS["plain"]
    all_reduce = STEPS * BUCKET * model.hidden_size * 4
    for found in check(pools[2], ParallelPlan(2, 2), "plain", grouped=False):
        assert found.sent == {
            "embedding": all_reduce,
            "linear": 3 * all_reduce,  # attention of both layers, and a dense feed-forward
            "combine": all_reduce,
            "logits": BUCKET * 8 + (1 + STEPS) * BUCKET * 26 * 4,
        }


def test_hybrid(pools: dict[int, Pool]) -> None:
    """Two key heads on four ranks, too."""
    check(pools[4], ParallelPlan(4, 2), "shared", grouped=False)
