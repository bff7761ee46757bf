"""CPU tensors on large pages. Enters: shapes and dtypes. Leaves: tensors side by side in one piece of memory.

A decode step reads its weights from memory once. On pages of 4 KiB the processor looks up some hundred thousand
addresses for that, and in a virtual machine each in two tables; on pages of 2 MiB it looks up a few hundred. Linux has
them for who asks, unless /sys/kernel/mm/transparent_hugepage/enabled says `never`. NumPy asks, for arrays of 4 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_PAGE = 2 * 2**20
_LINE = 64  # bytes: of a cache line, and of a vector register


def move_to_large_pages(tensors: Iterable[Tensor]) -> None:
    """Give tensors new memory, in this order, before they are filled: what they hold is lost."""
    tensors = list(tensors)
    for tensor, new in zip(tensors, zeros([(tensor.shape, tensor.dtype) for tensor in tensors]), strict=True):
        tensor.data = new


def zeros(parts: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Tensors of these shapes. Their memory is taken when it is first written, and given back with the last of them."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _LINE) * _LINE)
    raw = torch.from_numpy(np.zeros(starts.pop() + _PAGE, dtype=np.uint8))
    first = -raw.data_ptr() % _PAGE
    return [
        raw[first + start : first + start + size].view(dtype).view(*shape)
        for start, size, (shape, dtype) in zip(starts, sizes, parts, strict=True)
    ]
