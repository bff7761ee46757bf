"""The reference backend: short, obvious, correct on every device. Others are compared with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.kernels.swiglu import swiglu
from flexmoe.moe.experts.weights import ExpertWeights
from flexmoe.moe.permute import permute


class ReferenceExperts(ExpertWeights):
    """One expert after the other, each on the rows that chose it."""

    def forward(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = permute(slot_ids, weights, self.num_slots)
        start = 0
        for slot, count in enumerate(chosen.counts):
            rows = chosen.rows[start : start + count]
            scale = chosen.weights[start : start + count, None].to(x.dtype)
            hidden = swiglu(F.linear(x[rows], self.gate_up[slot]))
            out[rows] += F.linear(hidden, self.down[slot]) * scale
            start += count
        return out
