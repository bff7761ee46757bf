"""Weights as small integers with a scale for each group of a row. Enters: weights [..., N, K]. Leaves: codes, scales.

Symmetric, along K: a group's scale is its largest magnitude over the largest code, rounded to bf16, and a weight is its
code times its scale. K need not be a multiple of the group; the last one is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.config.packing import GROUP, code_columns

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
        dtype = torch.int8 if bits == 8 else torch.uint8
        return cls(torch.empty(*rows, code_columns(columns, bits), dtype=dtype), scales, bits, columns)

    @property
    def shape(self) -> torch.Size:
        """Of the weights."""
        return torch.Size((*self.codes.shape[:-1], self.columns))

    def numel(self) -> int:
        """How many weights."""
        return self.shape.numel()

    def __getitem__(self, index: int | slice | Tensor) -> QuantizedMatrix:
        return QuantizedMatrix(self.codes[index], self.scales[index], self.bits, self.columns)

    def assign(self, codes: Tensor, scales: Tensor, group: int) -> None:
        """Take codes as they are, and scales [..., N, K / group], each for so many columns."""
        self.codes.copy_(codes)
        groups = self.scales.shape[-1]
        self.scales.copy_(scales.repeat_interleave(group // GROUP, -1)[..., :groups] if group > GROUP else scales)

    def copy_(self, values: Tensor, group: int = GROUP) -> QuantizedMatrix:
        """Quantize weights of this shape, of any dtype, into this one; group: columns that share a scale."""
        padded = F.pad(values.float(), (0, -self.columns % GROUP)).unflatten(-1, (-1, GROUP))  # [..., N, G, 32]
        largest = _LARGEST[self.bits]
        scales = (_shared(padded.abs().amax(-1), group // GROUP) / largest).bfloat16()  # [..., N, G]
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


def _shared(magnitudes: Tensor, count: int) -> Tensor:
    """Of every `count` neighbours the largest, for each of them."""
    if count == 1:
        return magnitudes
    groups = magnitudes.shape[-1]
    largest = F.pad(magnitudes, (0, -groups % count)).unflatten(-1, (-1, count)).amax(-1)
    spread: Tensor = largest.repeat_interleave(count, -1)[..., :groups]
    return spread


Weights = Tensor | QuantizedMatrix
