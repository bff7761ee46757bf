"""The first half of an expert, hidden = silu(gate) * up: plain torch, the reference of the Triton kernels.

Enters: rows x [T, H], the experts topk_ids [T, K] that each chose (-1: none), gate_up [S, 2F, H]. Leaves: [T*K, F].
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.kernels.swiglu import swiglu


def expert_gate_up(x: Tensor, topk_ids: Tensor, gate_up: Tensor) -> Tensor:
    """Row t*K + k: token t and its k-th expert, computed in fp32, in the dtype of x; 0 where there is no expert."""
    ids = topk_ids.flatten()
    rows = x.repeat_interleave(topk_ids.shape[1], 0).float()  # [T*K, H]
    both = torch.stack([gate_up[i].float() @ row for i, row in zip(ids.clamp(min=0).tolist(), rows, strict=True)])
    return swiglu(both).masked_fill_(ids[:, None] < 0, 0.0).to(x.dtype)
