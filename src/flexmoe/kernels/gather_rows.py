"""The rows of all ranks on each of them: the torch reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_rows(parts: Sequence[Tensor]) -> Tensor:
    """Parts [T, H] of P ranks -> [P T, H], in the order of the ranks."""
    return torch.cat(list(parts))
