"""Sum over ranks what each of them computed of some rows: the torch reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_reduce(parts: Sequence[Tensor], x: Tensor | None = None) -> Tensor:
    """Parts [T, H] of all ranks -> fp32 [T, H]: x, if there is one, plus their sum, taken in the order of the ranks."""
    total = torch.zeros(parts[0].shape, dtype=torch.float32, device=parts[0].device)
    for part in parts:
        total = total + part.float()
    return total if x is None else x + total
