"""SwiGLU (Shazeer, 2020): silu(gate) * up, with gate and up side by side in the last dimension."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] with the gate first -> [..., F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
