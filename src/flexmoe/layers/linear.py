"""Linear: a projection whose weight is packed for the device once it has been loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.kernels.linear import PackedLinear


class Linear(nn.Module):
    """[T, in] -> [T, out]. `pack()` must be called after loading and before the first use."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype, device=device), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(out_size, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self._packed: PackedLinear | None = None

    def pack(self) -> None:
        """Hand the weight to the packed form and forget it here, so that it exists once in memory."""
        bias = None if self.bias is None else self.bias.data
        self._packed = PackedLinear(self.weight.data, bias)
        del self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        assert self._packed is not None, "Linear.pack() was not called after loading"
        return self._packed(x)
