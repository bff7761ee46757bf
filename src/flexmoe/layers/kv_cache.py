"""KVCache: the keys and values of every layer, in slots that the block manager hands out by the block."""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.layers import large_pages


class KVCache:
    """layers[i]: [num_blocks * block_size, 2, Hkv, D]; slot s belongs to block s // block_size."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        a = config.attention
        shape = (num_blocks * block_size, 2, a.num_kv_heads, a.head_dim)
        # Zeros, not empty: a masked key must be finite, since 0 * NaN is NaN.
        self.layers: list[Tensor]
        if device.type == "cpu":
            self.layers = large_pages.zeros([(shape, dtype)] * config.num_layers)
        else:
            self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layers]
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    a = config.attention
    return config.num_layers * block_size * 2 * a.num_kv_heads * a.head_dim * dtype.itemsize
