"""KVCache: its shape, that it starts with zeros, and that it is as large as was foretold."""

from __future__ import annotations

import pytest
import torch

from flexmoe.config.model import LayerConfig
from flexmoe.layers.kv_cache import KVCache, block_bytes
from tests.cpu.tiny_decoders import CPU, config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 1), (7, 16), (5, 3)])
def test_a_cache_as_large_as_its_blocks(num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
    model = config({"num_heads": 6, "num_kv_heads": 3, "head_dim": 16}, layers=(LayerConfig(is_moe=True),) * 4)
    cache = KVCache(model, num_blocks, block_size, dtype, CPU)
    assert [layer.shape for layer in cache.layers] == [(num_blocks * block_size, 2, 3, 16)] * 4
    assert {layer.dtype for layer in cache.layers} == {dtype}
    assert all(layer.is_contiguous() for layer in cache.layers)
    size = num_blocks * block_size * 2 * 3 * 16 * 4 * dtype.itemsize
    assert cache.num_bytes == size == num_blocks * block_bytes(model, block_size, dtype)
    assert len({layer.data_ptr() for layer in cache.layers}) == 4


def test_a_masked_key_is_finite_from_the_start() -> None:
    """0 times whatever lay in the memory before might be NaN."""
    kept = [torch.full((1000, 2, 2, 16), float("nan")) for _ in range(20)]
    del kept
    assert not any(layer.any() for layer in KVCache(config(), 100, 10, torch.float32, CPU).layers)


def test_layers_begin_at_vector_boundaries() -> None:
    for num_blocks in range(1, 30):
        for layer in KVCache(config(), num_blocks, 1, torch.bfloat16, CPU).layers:
            assert layer.data_ptr() % 64 == 0
