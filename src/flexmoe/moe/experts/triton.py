"""The GPU backend: rows grouped by expert on the device, both halves of an expert on its tensor cores, one sum a row.

Nothing waits for the host, and no shape depends on the routing: a forward can be captured in a CUDA graph. Steps of a
few rows go past this class, to the kernels that a fused decoder calls itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.kernels.triton.combine import combine
from flexmoe.kernels.triton.expert_down import expert_down_grouped
from flexmoe.kernels.triton.expert_gate_up import expert_gate_up_grouped
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.moe.experts.weights import ExpertWeights


class TritonExperts(ExpertWeights):
    """The grouped Triton kernels. On a CPU they run in Triton's interpreter only, for tests."""

    def forward(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Tensor:
        (R, K), S = slot_ids.shape, self.num_slots
        if R == 0 or S == 0:  # a rank without rows, or without experts
            return torch.zeros_like(x)
        out = torch.empty_like(x)
        x, slot_ids, weights = x.contiguous(), slot_ids.contiguous(), weights.contiguous()
        rows = torch.empty(S, R, dtype=torch.int32, device=x.device)
        counts = torch.empty(S, dtype=torch.int32, device=x.device)
        hidden = x.new_empty(R * K, self.width)
        y = x.new_empty(R * K, self.hidden_size)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            group_by_expert(slot_ids, S, rows, counts)
            expert_gate_up_grouped(x, rows, counts, self.gate_up, hidden, top_k=K)
            expert_down_grouped(hidden, rows, counts, weights, self.down, y)
            combine(y, slot_ids, out, accumulate=False)
        return out
