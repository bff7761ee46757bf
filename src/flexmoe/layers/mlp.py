"""GatedMLP: the dense SwiGLU feed-forward of dense layers and of shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.kernels.swiglu import swiglu
from flexmoe.layers.linear import Linear


class GatedMLP(nn.Module):
    """[T, H] -> [T, H] through width F; gate and up are one projection."""

    def __init__(
        self, hidden_size: int, width: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * width, bias=bias, dtype=dtype, device=device)
        self.down = Linear(width, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))  # type: ignore[no-any-return]
