"""ExpertWeights: the two stacked matrices that every backend starts from."""

from __future__ import annotations

import torch
from torch import nn

from flexmoe.kernels.quantize import QuantizedMatrix


class ExpertWeights(nn.Module):
    """gate_up [S, 2F, H] (gate rows first) and down [S, H, F] for S physical slots, empty until loaded."""

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(
        self, num_slots: int, hidden_size: int, width: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.num_slots, self.hidden_size, self.width = num_slots, hidden_size, width
        gate_up = torch.empty(num_slots, 2 * width, hidden_size, dtype=dtype, device=device)
        down = torch.empty(num_slots, hidden_size, width, dtype=dtype, device=device)
        self.gate_up = nn.Parameter(gate_up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)
        self.quantized: dict[str, QuantizedMatrix] = {}

    def quantize(self, bits: int) -> None:
        """Hold both stacks in so many bits, before they are loaded: in `quantized`, by name."""
        for name in ("gate_up", "down"):
            self.quantized[name] = QuantizedMatrix.empty(getattr(self, name).shape, bits)
            delattr(self, name)

    def pack(self, *, prepack: bool) -> None:
        """Make the loaded weights ready for the backend's arithmetic; prepack: in layouts of their own."""
