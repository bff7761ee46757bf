"""Add what the K experts of a token made of it: plain torch, the reference of the Triton kernel.

Enters: y [T * K, H], one row an assignment and already weighted, and slot ids [T, K]. Leaves: fp32 [T, H].
"""

from __future__ import annotations

from torch import Tensor


def combine(y: Tensor, topk_ids: Tensor) -> Tensor:
    """Sum over k, in fp32 and in order; an assignment whose id is -1 counts as zero, whatever its row of y holds."""
    T, K = topk_ids.shape
    parts = y.float().reshape(T, K, -1).masked_fill(topk_ids[:, :, None] < 0, 0.0)
    return parts.sum(1)
