"""KVCache: the keys and values of every layer, in slots that the block manager hands out by the block."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig

_ALIGNMENT = 64  # bytes of a cache line and of a vector register


class KVCache:
    """layers[i]: [num_blocks * block_size, 2, Hkv, D]; slot s belongs to block s // block_size."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        a = config.attention
        shape = (num_blocks * block_size, 2, a.num_kv_heads, a.head_dim)
        # Zeros, not empty: a masked key must be finite, since 0 * NaN is NaN.
        self.layers: list[Tensor] = [_zeros(shape, dtype, device) for _ in config.layers]
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that a CPU takes from memory only when they are written: torch.zeros would write them all at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + _ALIGNMENT, dtype=np.uint8))
    start = -raw.data_ptr() % _ALIGNMENT
    return raw[start : start + size].view(dtype).view(shape)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    a = config.attention
    return config.num_layers * block_size * 2 * a.num_kv_heads * a.head_dim * dtype.itemsize
