"""GatedMLP: the dense SwiGLU feed-forward of dense layers and of shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.kernels.swiglu import swiglu
from flexmoe.layers.linear import Linear
from flexmoe.parallel.comm import Group


class GatedMLP(nn.Module):
    """[T, H] -> [T, H] through width F; gate and up are one projection. summed: ranks that share F; see Linear."""

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
        summed: Group | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * width, bias=bias, dtype=dtype, device=device)
        self.down = Linear(width, hidden_size, bias=bias, dtype=dtype, device=device, summed=summed)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))  # type: ignore[no-any-return]
