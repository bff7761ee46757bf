"""The second half of an expert, its down projection: plain torch, the reference of the Triton kernels.

Enters: hidden [T*K, F], the experts topk_ids [T, K] (-1: none) with their weights, down [S, H, F]. Leaves: [T*K, H].
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_down(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, down: Tensor) -> Tensor:
    """Row t*K + k is down[topk_ids[t, k]] @ hidden[t*K + k], weighted, in fp32; 0 where there is no expert."""
    ids = topk_ids.flatten()
    y = torch.stack([down[i].float() @ row for i, row in zip(ids.clamp(min=0).tolist(), hidden.float(), strict=True)])
    return (y * topk_weights.reshape(-1, 1)).masked_fill_(ids[:, None] < 0, 0.0)
