"""RMSNorm with its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """[..., H] -> [..., H]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
