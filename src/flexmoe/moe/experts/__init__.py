"""ExpertBackend: HOW a group of tokens meets its experts.

Enters: rows x [R, H], their physical slots [R, K] (-1: not here) and weights [R, K] fp32.
Leaves: [R, H], for each row the weighted sum of the experts it found here.
"""

from __future__ import annotations

import torch

from flexmoe.moe.experts.cpu import CPUExperts
from flexmoe.moe.experts.reference import ReferenceExperts
from flexmoe.moe.experts.weights import ExpertWeights

BACKENDS: dict[str, type[ExpertWeights]] = {
    "reference": ReferenceExperts,
    "cpu": CPUExperts,
}


def make_experts(
    backend: str, num_slots: int, hidden_size: int, width: int, *, dtype: torch.dtype, device: torch.device
) -> ExpertWeights:
    """The experts of one layer for `backend`, with unfilled weights gate_up [S, 2F, H] and down [S, H, F]."""
    return BACKENDS[backend](num_slots, hidden_size, width, dtype=dtype, device=device)


def default_backend(device: torch.device) -> str:
    """The fastest backend for a device."""
    return "cpu" if device.type == "cpu" else "reference"
