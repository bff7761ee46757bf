"""Rotary position embedding (Su et al., 2021), in the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, D] by its positions.

    cos, sin: [T, 1, R] with R <= D rotated dimensions; the first half of `sin` carries the minus sign, so that
    rotating is one multiply and one multiply-add with the two halves swapped.
    """
    size = cos.shape[-1]
    part = x if size == x.shape[-1] else x[..., :size]
    rotated = torch.addcmul(part * cos, part.roll(size // 2, -1), sin)
    return rotated if part is x else torch.cat((rotated, x[..., size:]), -1)
