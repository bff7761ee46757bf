"""The Triton decode step on ranks, in Triton's interpreter over gloo, beside one process: tokens, logits, counts.

Two steps from an empty cache: the first is greedy, the second begins with tokens that only the devices know, and draws.
Data ranks have some of the rows each, or none, and are padded alike.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
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
from tests.multi.shared_files import shared_files
from tests.multi.worker import PoolWorker

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

Shares = tuple[tuple[int, ...], ...]

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
    """What one rank saw in all steps. orders: of each the requests, row by row. sent: bytes by label."""

    orders: list[list[int]]
    tokens: list[list[int]]
    logits: list[Tensor]
    topk_ids: list[Tensor]
    loads: list[LayerLoad]
    sent: dict[str, float]


class Recording:
    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.logits: list[Tensor] = []
        self.topk_ids: list[Tensor] = []

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        if stage in ("topk_ids", "logits"):
            getattr(self, stage).append(tensor[: self._rows].clone())


def share_of(model: ModelConfig, mesh: Mesh) -> tuple[Decoder, KVCache]:
    """This rank's share of a model with dummy weights."""
    decoder = Decoder(model, mesh.plan, "reference", 64, dtype=torch.float32, device=CPU, mesh=mesh).eval()
    fill_dummy({name: p.data for name, p in decoder.named_parameters()}, 7, torch.float32, mesh.shard(model))
    decoder.pack(in_place=True)
    return decoder, KVCache(mesh.shard(model).local, 40, BLOCK_SIZE, torch.float32, CPU)


def decode(mesh: Mesh, model: ModelConfig, grouped: bool, shares: Shares = ((0, 1, 2),)) -> Decoded:
    """shares: which of the requests each data rank has."""
    torch.manual_seed(1)
    decoder, cache = share_of(model, mesh)
    fused = FusedDecoder(decoder, 64, CPU, Coarse(grouped), max_rows=BUCKET)
    requests, _ = scattered([1] * ROWS, BLOCK_SIZE, model.vocab_size)
    states = [SamplingState(SamplingParams(temperature=0.9, top_k=20), seed) for seed in range(ROWS)]
    own = list(shares[mesh.place.dp])
    count, orders = len(own), [own, own[1:] + own[:1]]
    probe, counter, tokens = Recording(count), ExpertCounter(model, CPU), []
    packed = PackedRows(BUCKET, 32, CPU)
    for number, order in enumerate(orders):
        chunks = [ScheduledChunk(requests[row], number, 1, True) for row in order]
        sources = [own.index(row) if number else -1 for row in order]
        packed.load(chunks, sources, [states[row] for row in order] if number else ())
        sampling = Sampling(packed.sampling, filtered=True) if number else None
        with torch.inference_mode():
            fused.step(packed.rows, sampling, cache, probe)
            fused.count(BUCKET, counter)
        counter.passed(count)
        tokens.append(fused.sampled[:count].tolist())
    return Decoded(orders, tokens, probe.logits, probe.topk_ids, counter.loads("m"), mesh.traffic.take())


def decode_share(worker: PoolWorker, plan: ParallelPlan, folder: Path | None = None, **how: Any) -> Decoded:
    """folder: for memory that ranks share, and exchange in single launches."""
    with nullcontext() if folder is None else shared_files(folder):
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


def check(pool: Pool, plan: ParallelPlan, name: str, *, grouped: bool, folder: Path | None = None) -> list[Decoded]:
    wanted = in_one_process(name, grouped)
    ranks = pool.call(decode_share, plan=plan, model=MODELS[name], grouped=grouped, folder=folder)
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


DATA: dict[str, int] = {"data_parallel_size": 2}
SPREAD = DATA | {"expert_parallel_size": 2}


def check_data(
    pool: Pool, plan: ParallelPlan, name: str, *, grouped: bool, shares: Shares = ((0, 2), (1,)),
    folder: Path | None = None,
) -> list[Decoded]:  # fmt: skip
    wanted = in_one_process(name, grouped)
    ranks = pool.call(decode_share, plan=plan, model=MODELS[name], grouped=grouped, shares=shares, folder=folder)
    layers = len(wanted.topk_ids) // STEPS
    for found in ranks:
        for step, order in enumerate(found.orders):
            rows = [wanted.orders[step].index(request) for request in order]
            assert found.tokens[step] == [wanted.tokens[step][row] for row in rows]
            torch.testing.assert_close(found.logits[step], wanted.logits[step][rows], atol=1e-4, rtol=0)
            for layer in range(step * layers, (step + 1) * layers):
                assert torch.equal(found.topk_ids[layer], wanted.topk_ids[layer][rows])
    for number, load in enumerate(wanted.loads):
        counted = [ranks[first].loads[number] for first in range(0, plan.num_ranks, plan.tensor_parallel_size)]
        assert [sum(counts) for counts in zip(*(own.counts for own in counted), strict=True)] == list(load.counts)
        assert sum(own.tokens for own in counted) == load.tokens
    return ranks


@pytest.mark.parametrize("name", ["tied-full-norm", "shared"])
@pytest.mark.parametrize("degrees", [DATA, SPREAD], ids=["sliced", "spread"])
def test_data_ranks(pools: dict[int, Pool], degrees: dict[str, int], name: str) -> None:
    check_data(pools[2], ParallelPlan(**degrees), name, grouped=False)


def test_an_idle_data_rank_computes_for_the_other(pools: dict[int, Pool]) -> None:
    check_data(pools[2], ParallelPlan(**SPREAD), "shared", grouped=True, shares=((), (0, 1, 2)))


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "alone"])
def test_replicas_on_data_ranks(pools: dict[int, Pool], grouped: bool) -> None:
    """Rows are numbered over all data ranks, and all agree on who computes what."""
    plan = ParallelPlan(**SPREAD, placements={None: ExpertPlacement(6, REPLICAS)})
    check_data(pools[2], plan, "shared", grouped=grouped)


def test_data_ranks_of_several_ranks(pools: dict[int, Pool]) -> None:
    check_data(pools[4], ParallelPlan(2, **SPREAD), "shared", grouped=False)
    check_data(pools[4], ParallelPlan(2, 4, **DATA), "tied-full-norm", grouped=True)


def test_bytes_of_data_ranks_are_those_of_the_bucket(pools: dict[int, Pool]) -> None:
    """Whatever rows are in it. Lengths are told once a step; attention and vocabulary send nothing."""
    rows = STEPS * BUCKET * MODELS["plain"].hidden_size * 4
    for found in check_data(pools[2], ParallelPlan(**SPREAD), "plain", grouped=False, shares=((), (0, 1, 2))):
        assert found.sent == {"routing": STEPS * BUCKET * 4, "dispatch": rows, "combine": rows}


@pytest.mark.parametrize("name", ["tied-full-norm", "shared"])
def test_sums_in_one_launch(pools: dict[int, Pool], tmp_path: Path, name: str) -> None:
    """Ranks wait for each other in the kernels; the bytes are those of the formula for it."""
    rows = STEPS * BUCKET * MODELS[name].hidden_size * 4
    for found in check(pools[2], ParallelPlan(2, 2), name, grouped=False, folder=tmp_path):
        assert {label: found.sent[label] for label in ("embedding", "linear", "combine")} == {
            "embedding": rows, "linear": 2 * rows, "combine": 2 * rows,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shares", "grouped"), [("plain", ((0, 2), (1,)), False), ("shared", ((), (0, 1, 2)), True)],
    ids=["plain", "idle"],
)  # fmt: skip
def test_data_ranks_in_single_launches(
    pools: dict[int, Pool], tmp_path: Path, name: str, shares: Shares, grouped: bool
) -> None:
    plan, layers = ParallelPlan(**SPREAD), sum(layer.is_moe for layer in MODELS[name].layers)
    rows = STEPS * BUCKET * MODELS[name].hidden_size * 4 * layers
    for found in check_data(pools[2], plan, name, grouped=grouped, shares=shares, folder=tmp_path):
        del found.sent["control"]  # of when memory was made
        assert found.sent == {"routing": STEPS * BUCKET * 4, "dispatch": rows, "combine": rows}
