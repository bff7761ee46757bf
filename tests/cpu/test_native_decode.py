"""The C kernels against the torch layers: stage by stage, for every family and for sizes that fit no vector.

The reference is fp32 torch on the same weights; with bf16 ones it rounds what it writes to the cache, like the kernels.
So both dtypes must agree closely. In bf16 a key that rounds the other way costs a little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe.config.engine import LoadConfig
from flexmoe.config.model import LayerConfig, ModelConfig, RopeConfig
from flexmoe.engine.batch import build_paged_rows
from flexmoe.kernels.cpu.decode import supports
from flexmoe.models.decoder import Decoder
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights
from flexmoe.models.native import why_not_native
from tests.cpu.nearness import assert_near, error
from tests.cpu.paging import decode_step, scattered, slot
from tests.cpu.tiny_decoders import (
    CPU,
    NEEDS_COMPILER,
    by_c,
    by_c_with_stages,
    by_torch,
    config,
    copy_cache,
    decoder,
    empty,
    filled_cache,
    in_fp32,
    placed,
)  # fmt: skip
from tests.cpu.tiny_models import CASES, tiny

pytestmark = NEEDS_COMPILER
# bf16 units keep 16 bits of an activation: 5e-6 without, 5e-4 with keys that are rounded the other way in the cache.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
# Of models of any few numbers: half a unit of a rounded key's last place is 2e-3, and they may make several of that.
ODD_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(LIMITS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
MOE, DENSE = LayerConfig(is_moe=True), LayerConfig(is_moe=False)


def check(
    model: Decoder,
    lengths: Sequence[int],
    block_size: int,
    reference: Decoder | None = None,
    limits: Mapping[torch.dtype, float] = LIMITS,
) -> None:
    """One decode step of sequences of these lengths: all stages and logits agree, and only new slots are written."""
    dtype = model.norm.weight.dtype
    requests, num_blocks = scattered(lengths, block_size, model.config.vocab_size)
    cache = filled_cache(model.config, requests, num_blocks, block_size, dtype)
    before, wide, again = copy_cache(cache, dtype), copy_cache(cache, torch.float32), copy_cache(cache, dtype)
    wanted = by_torch(reference or in_fp32(model), requests, wide, dtype)
    found = by_c_with_stages(model, requests, cache)
    assert found.keys() == wanted.keys()
    for key, expected in wanted.items():
        if key[0] == "topk_ids":
            assert torch.equal(found[key], expected), key
        else:  # what a part adds is read off the residual stream, to its precision; the logits' own scale is 1
            scale = torch.tensor(expected.numel() ** 0.5 if key[0] == "logits" else 0.0)
            stream = wanted[("layer", key[1])].norm() if ("layer", key[1]) in wanted else scale
            off = float((found[key] - expected).norm() / torch.maximum(stream, expected.norm()))
            assert off <= limits[dtype], f"{key} is off by {off:.1e}"
    new = [slot(r, r.num_tokens - 1, block_size) for r in requests]
    for ours, exact, old in zip(cache.layers, wide.layers, before.layers, strict=True):
        assert_near(ours[new], exact[new], 1e-5 if dtype is torch.float32 else 4e-3)
        old[new] = ours[new]
        assert torch.equal(ours.view(torch.uint8), old.view(torch.uint8)), "a slot of another token was written"
    assert torch.equal(by_c(model, requests, again).double(), found["logits", -1]), "parts and whole differ"


def load(name: str, dtype: torch.dtype) -> Decoder:
    source = open_model(LoadConfig(model=str(tiny(name))))
    model = empty(source.config, dtype)
    load_weights(source, {name: parameter.data for name, parameter in model.named_parameters()})
    model.pack(1)
    return model


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_every_family(name: str, dtype: torch.dtype) -> None:
    model = load(name, dtype)
    assert why_not_native(model.config, dtype, CPU, "cpu") == ""
    check(model, [1, 2, 9, 16, 14], block_size=4)


@st.composite
def odd_models(draw: Any) -> ModelConfig:
    """Sizes that are multiples of nothing, except that a head must fill vectors."""
    kv = draw(st.integers(1, 3))
    dim = 16 * draw(st.integers(1, 6))
    rotary = 2 * draw(st.integers(1, dim // 2))
    experts = draw(st.integers(1, 11))
    attention = {
        "num_heads": kv * draw(st.integers(1, 4)), "num_kv_heads": kv, "head_dim": dim,
        "rope": RopeConfig(theta=1e4, rotary_dim=rotary), "qkv_bias": draw(st.booleans()),
        "out_bias": draw(st.booleans()), "qk_norm": draw(st.sampled_from(["none", "head", "full"])),
        "clip_qkv": draw(st.sampled_from([None, 0.5])),
    }  # fmt: skip
    moe = {
        "num_experts": experts, "top_k": draw(st.integers(1, experts)), "expert_width": draw(st.integers(1, 40)),
        "renormalize": draw(st.booleans()), "shared_width": draw(st.sampled_from([0, 1, 19, 32])),
    }  # fmt: skip
    if moe["shared_width"]:
        moe["shared_gate"] = draw(st.booleans())
    window = st.none() | st.integers(1, 20)
    layers = draw(st.lists(st.builds(LayerConfig, is_moe=st.booleans(), window=window), min_size=1, max_size=3))
    return config(
        attention, moe, hidden_size=draw(st.integers(17, 70)), vocab_size=draw(st.integers(1, 60)),
        dense_width=draw(st.integers(1, 40)), dense_bias=draw(st.booleans()), layers=tuple(layers),
        tie_embeddings=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=150)
@given(
    odd_models(), st.sampled_from(DTYPES), st.integers(1, 3), st.integers(0, 2**32),
    st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 20),
)  # fmt: skip
def test_odd_sizes(
    config: ModelConfig, dtype: torch.dtype, threads: int, seed: int, lengths: list[int], block_size: int
) -> None:
    torch.manual_seed(seed)
    check(decoder(config, dtype, threads), lengths, block_size, limits=ODD_LIMITS)


@dtypes
@pytest.mark.parametrize("block_size", [1, 3, 16, 2048])
@pytest.mark.parametrize("window", [None, 1, 7, 16, 5000])
def test_long_sequences_over_many_blocks(window: int | None, block_size: int, dtype: torch.dtype) -> None:
    layers = (LayerConfig(is_moe=False, window=window), DENSE)
    check(decoder(config(layers=layers), dtype, 2), [1500, 1, 17, 640, 16, 700], block_size)


def test_64_rows() -> None:
    """As many as the runner ever gives; and enough for the routing to be shared among threads."""
    model = decoder(config(moe={"num_experts": 40, "top_k": 5}, layers=(MOE, MOE)), threads=3)
    check(model, [1 + i % 30 for i in range(64)], block_size=4)


@dtypes
def test_a_table_may_be_wider_than_its_sequences(dtype: torch.dtype) -> None:
    """What lies beyond a sequence's blocks is never followed: here it would lead far out of the cache."""
    model = decoder(config(), dtype, 2)
    requests, num_blocks = scattered([5, 12, 1], 4, 50)
    cache = filled_cache(model.config, requests, num_blocks, 4, dtype)
    other = copy_cache(cache, dtype)
    rows = build_paged_rows(decode_step(requests), 4)
    tables = torch.full((3, 50), 2**30, dtype=torch.int32).numpy()
    for table, r in zip(tables, requests, strict=True):
        used = -(-r.num_tokens // 4)
        table[:used] = r.blocks[:used]
    assert model.native is not None
    wide = model.native(replace(rows, tables=tables), cache)
    assert torch.equal(wide, by_c(model, requests, other))


@dtypes
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e18])
def test_extreme_scores(scale: float, dtype: torch.dtype) -> None:
    """Scores so far apart that all but a few keys vanish: no infinity, no NaN, no key too much."""
    model = decoder(config(layers=(DENSE,)), dtype, 2)
    requests, num_blocks = scattered([60, 33, 2, 1], 8, 50)
    cache = filled_cache(model.config, requests, num_blocks, 8, dtype)
    cache.layers[0][:, 0] *= scale
    wide = copy_cache(cache, torch.float32)
    wanted = by_torch(in_fp32(model), requests, wide, dtype)
    found = by_c_with_stages(model, requests, cache)
    # A score of 1e4 has an error of 1e-3 in fp32, so the weights of near ones have one too.
    assert_near(found["attention", 0], wanted["attention", 0], 2e-3)


@dtypes
def test_equal_scores_average_the_values(dtype: torch.dtype) -> None:
    model = decoder(config(layers=(DENSE,)), dtype, 1)
    requests, num_blocks = scattered([37], 4, 50)
    cache = filled_cache(model.config, requests, num_blocks, 4, dtype)
    model.layers[0].attention.qkv.weight.data[:96] = 0.0  # queries and keys
    check_cache = copy_cache(cache, torch.float32)
    for each in (cache, check_cache):
        each.layers[0][:, 0] = 0.0
    wanted = by_torch(in_fp32(model), requests, check_cache, dtype)
    assert_near(by_c_with_stages(model, requests, cache)["attention", 0], wanted["attention", 0], LIMITS[dtype])


@dtypes
@pytest.mark.parametrize("slots", [(4, 2, 0, 5, 1, 3), (1, 1, 5, 0, 3, 2, 3, 4, 0, 5)])
def test_experts_in_other_slots(slots: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shuffled, and with more slots than experts: choices are logical ids, weights lie in physical slots."""
    plain = decoder(config(layers=(MOE, MOE)), dtype)
    moved = empty(plain.config, dtype, placed(plain.config.moe.num_experts, slots))
    weights = dict(plain.named_parameters())
    for name, parameter in moved.named_parameters():
        source = weights[name].data
        parameter.data.copy_(source[list(slots)] if ".experts." in name else source)
    moved.pack(2)
    check(moved, [3, 1, 20, 8, 8, 13, 2], 4, reference=in_fp32(plain))


def test_equal_router_scores_go_to_the_lower_expert() -> None:
    model = decoder(config(moe={"num_experts": 11, "top_k": 4, "renormalize": False}, layers=(MOE,)))
    router = model.layers[0].moe.router.weight.data
    router[:] = router[0]
    router[5] = 2 * router[0]
    requests, num_blocks = scattered([4, 9, 1, 7, 2, 12], 4, 50)
    stages = by_c_with_stages(model, requests, filled_cache(model.config, requests, num_blocks, 4, torch.float32))
    chosen = stages["topk_ids", 0].tolist()  # by a score above 0, or below it
    assert all(ids in ([5, 0, 1, 2], [0, 1, 2, 3]) for ids in chosen)
    router.zero_()
    requests, num_blocks = scattered([4, 9], 4, 50)
    stages = by_c_with_stages(model, requests, filled_cache(model.config, requests, num_blocks, 4, torch.float32))
    assert stages["topk_ids", 0].tolist() == [[0, 1, 2, 3]] * 2
    assert_near(stages["topk_weights", 0], torch.full((2, 4), 1 / 11), 1e-6)


def test_router_scores_beyond_the_range_of_exp() -> None:
    """All but one expert get probability 0, and are chosen by their ids."""
    model = decoder(config(moe={"num_experts": 6, "top_k": 3}, layers=(MOE,)))
    model.layers[0].moe.router.weight.data *= 1e4
    requests, num_blocks = scattered([4, 9, 2, 7, 7], 4, 50)
    cache = filled_cache(model.config, requests, num_blocks, 4, torch.float32)
    wanted = by_torch(in_fp32(model), requests, copy_cache(cache, torch.float32), torch.float32)
    found = by_c_with_stages(model, requests, cache)
    assert torch.equal(found["topk_ids", 0], wanted["topk_ids", 0])
    assert torch.equal(found["topk_weights", 0][:, 0], torch.ones(5).double())


@dtypes
def test_a_second_cache_may_follow_the_first(dtype: torch.dtype) -> None:
    """The kernels know a cache by its address: another one must be made known to them."""
    model = decoder(config(), dtype)
    requests, num_blocks = scattered([6, 11], 4, 50)
    first = filled_cache(model.config, requests, num_blocks, 4, dtype)
    second = filled_cache(model.config, requests, num_blocks, 4, dtype)
    a, b, again = by_c(model, requests, first), by_c(model, requests, second), by_c(model, requests, first)
    assert torch.equal(a, again)
    assert error(a, b) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "head_dim", "works"),
    [(torch.float32, 16, True), (torch.bfloat16, 128, True), (torch.float16, 64, False), (torch.float32, 24, False)],
)
def test_what_is_left_to_torch(dtype: torch.dtype, head_dim: int, works: bool) -> None:
    assert supports(dtype, head_dim) == works
    reason = why_not_native(config({"head_dim": head_dim}), dtype, CPU, "cpu")
    assert reason == ("" if works else f"dtype {dtype} with head_dim {head_dim}")


def test_other_devices_and_backends_are_left_to_torch() -> None:
    assert why_not_native(config(), torch.float32, torch.device("cuda"), "cpu") == "device cuda with expert backend cpu"
    assert why_not_native(config(), torch.float32, CPU, "reference") == "device cpu with expert backend reference"
