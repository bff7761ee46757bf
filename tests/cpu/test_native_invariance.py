"""The C kernels give a row the same bits alone, in any batch, with any number of threads, and every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.models.decoder import Decoder
from flexmoe.models.native import NativeDecoder
from tests.cpu.paging import scattered, slot
from tests.cpu.tiny_decoders import NEEDS_COMPILER, by_c, config, copy_cache, decoder, filled_cache

pytestmark = NEEDS_COMPILER
MOE, DENSE, WINDOW = LayerConfig(is_moe=True), LayerConfig(is_moe=False), LayerConfig(is_moe=True, window=6)
ODD: dict[str, Any] = {"hidden_size": 53, "vocab_size": 47, "dense_width": 27}
CONFIGS: dict[str, ModelConfig] = {
    "even": config(layers=(MOE, DENSE)),
    "odd": config(
        {"num_heads": 6, "head_dim": 48, "qk_norm": "full", "qkv_bias": True},
        {"num_experts": 7, "top_k": 3, "expert_width": 21, "shared_width": 19, "shared_gate": True},
        **ODD,
        layers=(MOE, WINDOW),
    ),
    "many-experts": config(
        {"qk_norm": "head", "clip_qkv": 0.5}, {"num_experts": 61, "top_k": 8, "renormalize": False}, layers=(MOE, MOE)
    ),
}
LENGTHS = [1, 30, 7, 16, 5, 90, 2, 33, 12, 64, 3, 17, 8, 40, 9, 21, *range(1, 49)]  # 64, as many as a step may have
COUNTS = [*range(1, 17), 31, 64]


def with_threads(model: Decoder, threads: int) -> NativeDecoder:
    """Another native decoder on the same weights."""
    layers = [layer.native() for layer in model.decoder_layers]
    return NativeDecoder(layers, model._outer_weights(), threads, 64)


def test_a_tile_of_short_activations_beside_one_of_long() -> None:
    """Of 1,408 numbers a tile holds 40 activations, of 2,048 it holds 24, and fewer numbers in all."""
    model = decoder(config(hidden_size=1408, dense_width=2048, layers=(DENSE,)), torch.bfloat16, 2)
    requests, num_blocks = scattered(list(range(1, 41)), 4, model.config.vocab_size)
    cache = filled_cache(model.config, requests, num_blocks, 4, torch.bfloat16)
    alone = torch.cat([by_c(model, [r], copy_cache(cache, torch.bfloat16)) for r in requests])
    assert torch.equal(by_c(model, requests, copy_cache(cache, torch.bfloat16)), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_alone_and_in_batches_with_1_to_3_threads(name: str, dtype: torch.dtype) -> None:
    model = decoder(CONFIGS[name], dtype)
    requests, num_blocks = scattered(LENGTHS, 4, model.config.vocab_size)
    cache = filled_cache(model.config, requests, num_blocks, 4, dtype)

    alone = torch.cat([by_c(model, [r], copy_cache(cache, dtype)) for r in requests])
    written = copy_cache(cache, dtype)
    for r in requests:
        by_c(model, [r], written)
    new = [slot(r, r.num_tokens - 1, 4) for r in requests]
    assert alone.isfinite().all()
    for threads in (1, 2, 3):
        model.native = with_threads(model, threads)
        for count in COUNTS:
            for start in {0, len(requests) - count}:
                own = copy_cache(cache, dtype)
                chosen = slice(start, start + count)
                logits = by_c(model, requests[chosen], own)
                assert torch.equal(logits, alone[chosen]), f"{count} rows from {start}, {threads} threads"
                for layer, expected in zip(own.layers, written.layers, strict=True):
                    assert torch.equal(layer[new[chosen]], expected[new[chosen]])


@pytest.mark.parametrize("threads", [2, 3])
def test_again_and_again(threads: int) -> None:
    """A race between threads would show now and then only."""
    model = decoder(CONFIGS["odd"], torch.bfloat16, threads)
    requests, num_blocks = scattered(LENGTHS[:5], 4, model.config.vocab_size)
    cache = filled_cache(model.config, requests, num_blocks, 4, torch.bfloat16)
    first = by_c(model, requests, cache)
    for _ in range(300):
        assert torch.equal(by_c(model, requests, cache), first)


def test_the_order_of_rows_does_not_matter() -> None:
    model = decoder(CONFIGS["even"], torch.float32, 2)
    requests, num_blocks = scattered(LENGTHS, 4, model.config.vocab_size)
    cache = filled_cache(model.config, requests, num_blocks, 4, torch.float32)
    logits = by_c(model, requests, copy_cache(cache, torch.float32))
    assert torch.equal(by_c(model, requests[::-1], cache).flip(0), logits)


def test_blocks_do_not_matter() -> None:
    """The same keys in other blocks, and in blocks of another size."""
    model = decoder(CONFIGS["odd"], torch.bfloat16, 2)
    rows: list[torch.Tensor] = []
    for block_size in (1, 3, 16, 100):
        torch.manual_seed(5)
        tokens = torch.randint(47, (90,)).tolist()
        keys = [torch.randn(90, 2, 2, 48).bfloat16() for _ in range(2)]
        requests, num_blocks = scattered([90], block_size)
        requests[0].token_ids = tokens
        cache = filled_cache(model.config, requests, num_blocks, block_size, torch.bfloat16)
        places = [slot(requests[0], p, block_size) for p in range(90)]
        for layer, values in zip(cache.layers, keys, strict=True):
            layer[places] = values
        rows.append(by_c(model, requests, cache))
    assert all(torch.equal(row, rows[0]) for row in rows)
