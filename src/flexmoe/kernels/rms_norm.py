"""Root-mean-square norm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., H] by its last dimension; the mean is taken in fp32, the result has x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return wide.mul(scale).to(x.dtype).mul_(weight)
