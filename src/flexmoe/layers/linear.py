"""Linear: a projection whose weight is packed for the device once it has been loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.kernels.linear import PackedLinear, QuantizedLinear
from flexmoe.kernels.quantize import QuantizedMatrix
from flexmoe.parallel.comm import Group


class Linear(nn.Module):
    """[T, in] -> [T, out]. `pack()` must be called after loading and before the first use.

    summed: the ranks that each hold some of the columns; their products are added, and the bias once.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        summed: Group | None = None,
    ) -> None:
        super().__init__()
        self._summed = None if summed is None or summed.size == 1 else summed
        weight = torch.empty(out_size, in_size, dtype=dtype, device=device)
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype, device=device), requires_grad=False)
        self.quantized: QuantizedMatrix | None = None
        self._packed: PackedLinear | QuantizedLinear | None = None

    @property
    def added(self) -> Tensor | None:
        """The bias that this rank adds: of several whose products are summed only the first one does."""
        return None if self.bias is None or (self._summed and self._summed.index > 0) else self.bias.data

    def quantize(self, bits: int) -> None:
        """Hold the weight in so many bits, before it is loaded."""
        assert self.weight is not None
        self.quantized = QuantizedMatrix.empty(self.weight.shape, bits)
        self.weight = None

    def pack(self, *, prepack: bool) -> None:
        """Make the layer ready. prepack: hand the weight to a layout of its own and forget it here."""
        if self.quantized is not None:
            self._packed = QuantizedLinear(self.quantized, self.added)
            return
        assert self.weight is not None
        self._packed = PackedLinear(self.weight.data, self.added, prepack=prepack)
        if prepack:
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        assert self._packed is not None, "Linear.pack() was not called after loading"
        y = self._packed(x)
        return y if self._summed is None else self._summed.all_reduce(y, "linear")
