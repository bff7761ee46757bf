"""What ranks load and are sent: parameters of a share's size and no byte more, and steps that mean the same there."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
import torch

from flexmoe.config.engine import LoadConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.batch import build_batch
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.engine.wire import pack, unpack
from flexmoe.layers.kv_cache import KVCache, block_bytes
from flexmoe.models.decoder import Decoder
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights
from flexmoe.models.slices import num_parameters
from flexmoe.parallel.mesh import Mesh
from flexmoe.scheduling.step import ScheduledChunk, Step
from tests.cpu.paging import decodes, scattered
from tests.cpu.tiny_models import tiny

CPU = torch.device("cpu")
CASES = ["mixtral-tied", "olmoe-odd", "qwen2_moe", "qwen3_moe-odd", "llama-mha-bias"]
DENSE_PLANS = [ParallelPlan(2), ParallelPlan(4), ParallelPlan(2, pipeline_parallel_size=2)]
PLANS = [*DENSE_PLANS, ParallelPlan(2, 2), ParallelPlan(4, 2), ParallelPlan(4, 4), ParallelPlan(2, 2, 1, 2)]


@pytest.mark.parametrize("layout", ["saved", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_a_rank_reads_its_share_and_nothing_else(case: str, layout: Any) -> None:
    source = open_model(LoadConfig(model=str(tiny(case, layout=layout))))
    for plan in DENSE_PLANS if source.config.moe is None else PLANS:
        for rank in range(plan.num_ranks):
            mesh = Mesh(plan, rank)
            model = Decoder(source.config, plan, "reference", 32, dtype=torch.float32, device=CPU, mesh=mesh)
            params = {name: parameter.data.fill_(torch.nan) for name, parameter in model.named_parameters()}
            report = load_weights(source, params, mesh.shard(source.config))
            held = sum(parameter.numel() for parameter in params.values())
            assert report.bytes_read == 4 * held
            assert num_parameters(mesh.shard(source.config)) == held
            assert not any(parameter.isnan().any() for parameter in params.values())


@pytest.mark.parametrize(("case", "tied"), [("mixtral-tied", True), ("qwen2_moe", False)])
def test_what_a_stage_holds(case: str, tied: bool) -> None:
    """Its layers and their part of the cache; the first the embedding, the last norm and head (or the embedding)."""
    config = open_model(LoadConfig(model=str(tiny(case)))).config
    plan = ParallelPlan(pipeline_parallel_size=2)
    half = config.num_layers // 2
    held, sizes = [], []
    for rank in range(2):
        mesh = Mesh(plan, rank)
        model = Decoder(config, plan, "reference", 32, dtype=torch.float32, device=CPU, mesh=mesh)
        held.append({name for name, parameter in model.named_parameters() if parameter.numel()})
        cache = KVCache(mesh.shard(config).local, 3, 4, torch.float32, CPU)
        assert cache.num_bytes == 3 * block_bytes(mesh.shard(config).local, 4, torch.float32)
        sizes.append(len(cache.layers))
    assert sizes == [half, half]
    outer = [{name for name in names if not name.startswith("layers.")} for names in held]
    assert outer == [{"embed_tokens.weight"}, {"norm.weight", "embed_tokens.weight" if tied else "lm_head.weight"}]
    numbers = [{int(name.split(".")[1]) for name in names if name.startswith("layers.")} for names in held]
    assert numbers == [set(range(half)), set(range(half, 2 * half))]


def test_replicas_are_read_once() -> None:
    source = open_model(LoadConfig(model=str(tiny("mixtral"))))
    plan = ParallelPlan(2, 2, placements={None: ExpertPlacement(4, ((0, 1, 0), (2, 3)))})
    mesh = Mesh(plan, 0)
    model = Decoder(source.config, plan, "reference", 32, dtype=torch.float32, device=CPU, mesh=mesh)
    params = {name: parameter.data for name, parameter in model.named_parameters()}
    report = load_weights(source, params, mesh.shard(source.config))
    experts = params["layers.0.moe.experts.gate_up"], params["layers.0.moe.experts.down"]
    assert torch.equal(experts[0][0], experts[0][2])
    assert report.bytes_read == sum(p.nbytes for p in params.values()) - 2 * sum(e[0].nbytes for e in experts)


def random_step(rng: random.Random) -> tuple[Step, list[SamplingState]]:
    requests, _ = scattered([rng.randint(2, 30) for _ in range(rng.randint(1, 6))], 4)
    for r in requests:
        r.contiguous = all(b == r.blocks[0] + i for i, b in enumerate(r.blocks))
    count = rng.randint(0, len(requests))
    chunks = decodes(requests[:count])
    for r in requests[count:]:
        start = rng.randrange(r.num_tokens)
        size = rng.randint(1, r.num_tokens - start)
        chunks.append(ScheduledChunk(r, start, size, start + size == r.num_tokens))
    kinds = [SamplingParams(temperature=0), SamplingParams(temperature=0.8), SamplingParams(presence_penalty=0.5)]
    states = [SamplingState(kinds[i % 3], i, c.request.token_ids) for i, c in enumerate(chunks) if c.samples]
    return Step(chunks, count, []), states


@pytest.mark.parametrize("seed", range(20))
def test_a_step_means_the_same_elsewhere(seed: int) -> None:
    torch.manual_seed(seed)
    step, states = random_step(random.Random(seed))
    there, their_states = unpack(pickle.loads(pickle.dumps(pack(step, states))))
    assert there.num_decodes == step.num_decodes
    assert [(c.start, c.num_tokens, c.samples) for c in there.chunks] == [
        (c.start, c.num_tokens, c.samples) for c in step.chunks
    ]
    ours, theirs = (build_batch(s, 4, [None, 5], CPU) for s in (step, there))
    for name in ("token_ids", "positions", "slot_mapping"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert str(ours.attention) == str(theirs.attention)
    assert (ours.sample_rows is None) == (theirs.sample_rows is None)
    for state, other in zip(states, their_states, strict=True):
        assert other.params.greedy == state.params.greedy
        assert state.plain_greedy or (other.uniform() == state.uniform() and len(other.seen) == len(state.seen))


def test_the_last_token_and_the_length_are_known_elsewhere() -> None:
    requests, _ = scattered([9], 4)
    there, _ = unpack(pack(Step(decodes(requests), 1, []), []))
    tokens = there.chunks[0].request.token_ids
    assert (len(tokens), tokens[-1], tokens[8]) == (9, requests[0].token_ids[-1], requests[0].token_ids[8])
