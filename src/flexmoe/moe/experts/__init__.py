"""ExpertBackend: HOW a group of tokens meets its experts.

Enters: rows x [R, H], their physical slots [R, K] (-1: not here) and weights [R, K] fp32.
Leaves: [R, H], for each row the weighted sum of the experts it found here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flexmoe.kernels.gpu import why_no_triton
from flexmoe.moe.experts.cpu import CPUExperts
from flexmoe.moe.experts.reference import ReferenceExperts
from flexmoe.moe.experts.weights import ExpertWeights


def _triton() -> type[ExpertWeights]:
    from flexmoe.moe.experts.triton import TritonExperts  # imports triton, for which a start without it shall not wait

    return TritonExperts


BACKENDS: dict[str, Callable[[], type[ExpertWeights]]] = {
    "reference": lambda: ReferenceExperts,
    "cpu": lambda: CPUExperts,
    "triton": _triton,
}


def make_experts(
    backend: str, num_slots: int, hidden_size: int, width: int, *, dtype: torch.dtype, device: torch.device
) -> ExpertWeights:
    """The experts of one layer for `backend`, with unfilled weights gate_up [S, 2F, H] and down [S, H, F]."""
    return BACKENDS[backend]()(num_slots, hidden_size, width, dtype=dtype, device=device)


def default_backend(device: torch.device) -> str:
    """The fastest backend for a device."""
    if device.type == "cpu":
        return "cpu"
    return "reference" if why_no_triton(device) else "triton"
