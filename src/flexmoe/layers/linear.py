"""Linear: a projection whose weight is packed for the device once it has been loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.kernels.linear import PackedLinear


class Linear(nn.Module):
    """[T, in] -> [T, out]. `pack()` must be called after loading and before the first use."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight = torch.empty(out_size, in_size, dtype=dtype, device=device)
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype, device=device), requires_grad=False)
        self._packed: PackedLinear | None = None

    def pack(self, *, prepack: bool) -> None:
        """Make the layer ready. prepack: hand the weight to a layout of its own and forget it here."""
        assert self.weight is not None
        self._packed = PackedLinear(self.weight.data, None if self.bias is None else self.bias.data, prepack=prepack)
        if prepack:
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        assert self._packed is not None, "Linear.pack() was not called after loading"
        return self._packed(x)
