"""Weights as small integers with a scale for each group of a row. Enters: weights [..., N, K]. Leaves: codes, scales.

Symmetric, along K: a group's scale is its largest magnitude over the largest code, rounded to bf16, and a weight is its
code times its scale. K need not be a multiple of the group; the last one is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # as in kernels/cpu/vector.h
_HALF = GROUP // 2
_LARGEST = {8: 127, 4: 7}


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A stack of matrices [..., N, K]; an index gives a view of part of it.

    codes: of 8 bits int8 [..., N, K]; of 4 bits uint8 [..., N, 16 G], where byte i of a group holds its code i + 8 in
    the low bits and code i + 16, plus 8, in the high ones. scales: bf16 [..., N, G], with G = K / 32, rounded up.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    columns: int

    @classmethod
    def empty(cls, shape: torch.Size, bits: int) -> QuantizedMatrix:
        """Room for weights of this shape."""
        *rows, columns = shape
        groups = -(-columns // GROUP)
        scales = torch.empty(*rows, groups, dtype=torch.bfloat16)
        if bits == 8:
            return cls(torch.empty(*rows, columns, dtype=torch.int8), scales, bits, columns)
        return cls(torch.empty(*rows, groups * _HALF, dtype=torch.uint8), scales, bits, columns)

    @property
    def shape(self) -> torch.Size:
        """Of the weights."""
        return torch.Size((*self.codes.shape[:-1], self.columns))

    def numel(self) -> int:
        """How many weights."""
        return self.shape.numel()

    def __getitem__(self, index: int | slice | Tensor) -> QuantizedMatrix:
        return QuantizedMatrix(self.codes[index], self.scales[index], self.bits, self.columns)

    def copy_(self, values: Tensor) -> QuantizedMatrix:
        """Quantize weights of this shape, of any dtype, into this one."""
        padded = F.pad(values.float(), (0, -self.columns % GROUP)).unflatten(-1, (-1, GROUP))  # [..., N, G, 32]
        largest = _LARGEST[self.bits]
        scales = (padded.abs().amax(-1) / largest).bfloat16()
        divisors = scales.float().masked_fill_(scales == 0, 1.0)[..., None]
        codes = (padded / divisors).round_().clamp_(-largest, largest).to(torch.int8)
        self.scales.copy_(scales)
        if self.bits == 8:
            self.codes.copy_(codes.flatten(-2)[..., : self.columns])
        else:
            codes = (codes + 8).to(torch.uint8)
            self.codes.copy_((codes[..., :_HALF] | codes[..., _HALF:] << 4).flatten(-2))
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [..., N, K]; in fp32 exactly what the codes and scales say."""
        if self.bits == 8:
            codes = F.pad(self.codes, (0, -self.columns % GROUP)).unflatten(-1, (-1, GROUP))
        else:
            both = self.codes.unflatten(-1, (-1, _HALF))
            codes = torch.cat((both & 15, both >> 4), -1).to(torch.int8) - 8
        wide: Tensor = codes.to(dtype) * self.scales[..., None].to(dtype)  # [..., N, G, 32]
        return wide.flatten(-2)[..., : self.columns]


Weights = Tensor | QuantizedMatrix
