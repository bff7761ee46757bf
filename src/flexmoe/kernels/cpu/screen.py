"""A head in 8 bits with bounds: which tokens can be the most likely. Enters: the head [V, H]. Leaves: a Screen.

`screen.h` looks through it before it reads the head, for rows of which only the largest logit matters.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_LINE = 64  # codes of a cache line
_LARGEST = 127
MOST_COLUMNS = 2**31 // (255 * _LARGEST)  # whose sums of codes certainly fit into 32 bits
_ROWS = 256  # looked at together: few enough for the cache
_SPLIT = 2**-16  # of an activation, what its two bf16 parts leave out
_ROUNDING = 2**-24  # of each product and sum in fp32
_REST = 1.001  # for the rounding of the bounds themselves
_SMALLEST = 1e-30  # of a scale: weights that bf16 units take for 0 have codes of 0, and squares are not too small


@dataclass(frozen=True, slots=True)
class Screen:
    """Rows w of a head as codes c times a scale; activations x become codes times a scale, x', as they come.

    codes: int8 [V, S], S being H filled up to whole cache lines. scales, slack and lengths: fp32 [V]. shifts: int32
    [V], 128 times the sum of a row's codes, since those of activations are shifted to be positive.

    |w x - s c x'| <= |w - s c| |x| + |s c| |x - x'|, all four being lengths, by Cauchy and Schwarz: `slack` is the
    first, and bounds the rounding of the sums that compute w x, in whatever order; `lengths` is the third.
    """

    codes: Tensor
    scales: Tensor
    slack: Tensor
    lengths: Tensor
    shifts: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int) -> Screen:
        """Room for that of a head of this shape."""
        codes = torch.empty(rows, -(-columns // _LINE) * _LINE, dtype=torch.int8)
        shifts = torch.empty(rows, dtype=torch.int32)
        return cls(codes, torch.empty(rows), torch.empty(rows), torch.empty(rows), shifts)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [getattr(self, field.name) for field in fields(self)]

    def fill(self, head: Tensor) -> Screen:
        """Take the head's weights [V, H], of any dtype.

        In one thread: on a busy machine torch's wait for each other at each of these many small operations.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._fill(head)
        finally:
            torch.set_num_threads(threads)
        return self

    def _fill(self, head: Tensor) -> None:
        columns = head.shape[1]
        rounding = _SPLIT + (columns + 1) * _ROUNDING
        self.codes[:, columns:] = 0
        for start in range(0, len(head), _ROWS):
            rows = slice(start, start + _ROWS)
            part = head[rows].float()
            scales = (part.abs().amax(-1) / _LARGEST).clamp_min(_SMALLEST)
            part = part / scales[:, None]
            codes = part.round()
            self.codes[rows, :columns] = codes.to(torch.int8)
            self.shifts[rows] = 128 * codes.sum(-1).to(torch.int32)
            self.scales[rows] = scales
            self.lengths[rows] = _REST * scales * _lengths(codes)
            self.slack[rows] = _REST * scales * (_lengths(part - codes) + rounding * _lengths(part))


def _lengths(rows: Tensor) -> Tensor:
    """Of each row, [N]."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return lengths
