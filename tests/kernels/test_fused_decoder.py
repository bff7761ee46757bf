"""A decode step in the Triton kernels against the decoder in torch: every stage, every family, padded rows and all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flexmoe.config.engine import LoadConfig
from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.kernels.triton.decode_attention import DecodeAttentionTile
from flexmoe.kernels.triton.expert_down import DownGemvTile, DownTile
from flexmoe.kernels.triton.expert_gate_up import GateUpGemvTile, GateUpTile
from flexmoe.kernels.triton.norm_linear import DotTile
from flexmoe.kernels.triton.route import RouteTile
from flexmoe.kernels.triton.tiles import (
    Limit,
    Measured,
    TileTable,
    attention_work,
    expert_work,
    grouping_work,
    linear_work,
    route_work,
)
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import Sampling
from flexmoe.models.fused import FusedDecoder
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights
from flexmoe.scheduling.request import Request
from tests.cpu.paging import decodes, scattered, slot
from tests.cpu.tiny_decoders import CPU, Recording, by_torch, config, copy_cache, decoder, filled_cache
from tests.cpu.tiny_models import CASES, tiny
from tests.kernels.coarse import Coarse
from tests.kernels.support import DEVICE, ON_GPU, distance

# The interpreter computes what is masked, too: the softmax of a row that is not there.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

BLOCK_SIZE = 4


def on_device(original: Decoder) -> Decoder:
    """The same weights in a decoder that the kernels read."""
    weights = {name: parameter.data for name, parameter in original.named_parameters()}
    dtype = original.embed_tokens.weight.dtype
    made = Decoder(original.config, ParallelPlan(), "reference", 64, dtype=dtype, device=DEVICE).eval()
    for name, parameter in made.named_parameters():
        parameter.data.copy_(weights[name])
    made.pack(in_place=True)
    return made


def step(
    fused: FusedDecoder, requests: Sequence[Request], cache: KVCache, bucket: int, states: Sequence[SamplingState] = ()
) -> Recording:
    """One step padded to `bucket` rows, with what a probe sees of it."""
    packed = PackedRows(bucket, 32, DEVICE)
    packed.load(decodes(requests), [-1] * len(requests), states)
    recording = Recording()
    sampling = Sampling(packed.sampling, filtered=True) if states else None
    fused.step(packed.rows, sampling, cache, recording)
    return recording


def moved(cache: KVCache) -> KVCache:
    made = copy_cache(cache, cache.layers[0].dtype)
    made.layers = [layer.to(DEVICE) for layer in made.layers]
    return made


def check(model: Decoder, lengths: Sequence[int], bucket: int, table: TileTable | None = None) -> None:
    requests, num_blocks = scattered(lengths, BLOCK_SIZE, model.config.vocab_size)
    before = filled_cache(model.config, requests, num_blocks, BLOCK_SIZE, torch.float32)
    exact = copy_cache(before, torch.float32)
    expected = by_torch(model, requests, exact, torch.float32)
    cache = moved(before)
    fused = FusedDecoder(on_device(model), 64, DEVICE, table)
    found = step(fused, requests, cache, bucket)
    for key, wanted in expected.items():
        assert_stage(key, found.stages[key][: len(wanted)].cpu(), wanted, expected)
    rows = len(requests)
    assert fused.sampled[:rows].tolist() == expected["logits", -1].argmax(-1).tolist()
    new = [slot(r, r.num_tokens - 1, BLOCK_SIZE) for r in requests]
    for ours, theirs, old in zip(cache.layers, exact.layers, before.layers, strict=True):
        assert distance(ours.cpu()[new], theirs[new]) < 1e-5
        old[new] = ours.cpu()[new]
        assert torch.equal(ours.cpu().view(torch.uint8), old.view(torch.uint8)), "a slot of another token was written"


def assert_stage(key: tuple[str, int], found: Tensor, wanted: Tensor, expected: dict[tuple[str, int], Tensor]) -> None:
    if key[0] == "topk_ids":
        assert torch.equal(found, wanted), key
        return
    stream = expected.get(("layer", key[1]), wanted).norm()  # what a part adds is read off the residual stream
    off = float((found - wanted).norm() / torch.maximum(stream, wanted.norm()))
    assert off < 1e-5, f"{key} is off by {off:.1e}"


def load(name: str) -> Decoder:
    source = open_model(LoadConfig(model=str(tiny(name))))
    model = Decoder(source.config, ParallelPlan(), "cpu", 64, dtype=torch.float32, device=CPU).eval()
    load_weights(source, {name: parameter.data for name, parameter in model.named_parameters()})
    model.pack(1)
    return model


@pytest.mark.parametrize("case", sorted(CASES) if ON_GPU else ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_every_family_agrees_stage_by_stage(case: str) -> None:
    check(load(case), (5,), 1, None if ON_GPU else Coarse(grouped=False))


@pytest.mark.parametrize(("rows", "bucket"), [(3, 4), (6, 6), (7, 8)])
def test_padded_steps_of_both_regimes_agree(rows: int, bucket: int) -> None:
    model = decoder(config())
    check(model, (9, 1, 14, 4, 3, 17, 2)[:rows], bucket)


@pytest.mark.parametrize(("rows", "alone", "in_one"), [(3, 0, 0), (6, 8, 0), (3, 1, 8)])
def test_measured_tiles_and_limits(rows: int, alone: int, in_one: int) -> None:
    """Others than the operations' own, with more scratch memory; and each regime where the other is usual."""
    made = config()
    hidden, dtype, moe = made.hidden_size, torch.float32, made.moe
    assert moe is not None
    tiles = (
        (linear_work(dtype, made.qkv_size, hidden, norm=True), DotTile(16, 32, 16, splits=4, num_stages=2)),
        (linear_work(dtype, hidden, hidden, norm=False), DotTile(16, 32, 32, splits=2, num_stages=2)),
        (
            attention_work(dtype, made.attention, long=False),
            DecodeAttentionTile(16, 1, 1, splits=8, min_split=16, per_head=True),
        ),
        (route_work(dtype, hidden, moe), RouteTile(16, 16, 32, 2, 2)),
        (expert_work("expert_gate_up_gemv", dtype, hidden, moe), GateUpGemvTile(columns=128, late_trigger=True)),
        (expert_work("expert_down_gemv", dtype, hidden, moe), DownGemvTile(4, 128, 2, early_ids=True)),
        (expert_work("expert_gate_up_grouped", dtype, hidden, moe), GateUpTile(16, 16, 16, num_stages=2, swap=True)),
        (expert_work("expert_down_grouped", dtype, hidden, moe), DownTile(32, 16, 16, num_stages=2)),
    )
    limits = (Limit(expert_work("expert_gemv", dtype, hidden, moe), alone), Limit(grouping_work(dtype, moe), in_one))
    table = TileTable((Measured(work, rows, tile, 1.0, 2.0) for work, tile in tiles), limits)
    check(decoder(made), (9, 1, 14, 4, 3, 17)[:rows], rows, table)


def small() -> ModelConfig:
    return config(layers=(LayerConfig(is_moe=True, window=3), LayerConfig(is_moe=False)), tie_embeddings=True)


def test_windows_and_tied_embeddings() -> None:
    check(decoder(small()), (9, 2), 2)


def test_tokens_that_are_only_on_the_device() -> None:
    """The next step, started from the tokens of the last in another order, computes what it would from the host's."""
    model = decoder(small())
    requests, num_blocks = scattered((6, 3, 9), BLOCK_SIZE, model.config.vocab_size)
    cache = moved(filled_cache(model.config, requests, num_blocks, BLOCK_SIZE, torch.float32))
    fused = FusedDecoder(on_device(model), 64, DEVICE, None if ON_GPU else Coarse(grouped=False))
    step(fused, requests, cache, 3)
    tokens = fused.sampled[:3].tolist()
    again = moved(cache)
    ahead = [requests[2], requests[0]]
    packed = PackedRows(3, 32, DEVICE)
    chunks = decodes(ahead)
    chunks = [type(c)(c.request, c.start + 1, 1, True) for c in chunks]
    packed.load(chunks, [2, 0], ())
    recording = Recording()
    fused.step(packed.rows, None, again, recording)
    for request, token in zip(requests, tokens, strict=True):
        request.append(token)
    expected = step(fused, ahead, cache, 3)
    assert torch.equal(recording.stages["logits", -1][:2], expected.stages["logits", -1][:2])


def test_draws_are_those_of_the_host_sampler() -> None:
    from flexmoe.engine.sampler import Sampler

    model = decoder(small())
    requests, num_blocks = scattered((6, 3, 9), BLOCK_SIZE, model.config.vocab_size)
    cache = moved(filled_cache(model.config, requests, num_blocks, BLOCK_SIZE, torch.float32))
    fused = FusedDecoder(on_device(model), 64, DEVICE, None if ON_GPU else Coarse(grouped=False))
    params = [SamplingParams(temperature=1.5), SamplingParams(temperature=0.0), SamplingParams(top_k=7, top_p=0.8)]
    states = [SamplingState(p, seed) for seed, p in enumerate(params)]
    found = step(fused, requests, cache, 4, states)
    logits = found.stages["logits", -1][:3].float()
    assert fused.sampled[:3].tolist() == Sampler().sample(logits, states).token_ids
