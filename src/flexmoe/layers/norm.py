"""RMSNorm with its weight, and the same over dimensions that several ranks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.kernels.rms_norm import rms_norm
from flexmoe.parallel.comm import Group


class RMSNorm(nn.Module):
    """[..., H] -> [..., H]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def scaled(self, x: Tensor, mean_square: Tensor) -> Tensor:
        """x [T, n], a part of rows whose mean square over all parts is mean_square [T, 1], fp32."""
        scale = torch.rsqrt(mean_square + self.eps)
        return x.float().mul(scale).to(x.dtype).mul_(self.weight)


def mean_squares(parts: tuple[Tensor, Tensor], copies: tuple[int, int], group: Group) -> tuple[Tensor, Tensor]:
    """Of two rows-wise shared tensors, the mean square of each row over all ranks: two [T, 1], fp32.

    parts: [T, n] each, this rank's. copies: how many ranks hold the same part.
    """
    own = [x.float().square().sum(-1, keepdim=True) / n for x, n in zip(parts, copies, strict=True)]
    total = group.all_reduce(torch.cat(own, -1), "qk_norm")  # [T, 2]
    sizes = [x.shape[-1] * group.size // n for x, n in zip(parts, copies, strict=True)]
    return total[:, :1] / sizes[0], total[:, 1:] / sizes[1]
