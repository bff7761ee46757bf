"""What tests of the kernels for Hopper share: where they run, and how far off a result is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

NEEDS_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a row, relative to the row; NaN never passes."""
    apart = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(apart.max())
