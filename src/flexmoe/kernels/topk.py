"""The K best experts of each row, by softmax probability: plain torch, the reference of the Triton kernel.

Enters: logits [T, E]. Leaves: expert ids [T, K] int32, best first, and their weights [T, K] fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk(logits: Tensor, top_k: int, *, renormalize: bool, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over all E experts, then the K largest; equal probabilities go to the lower expert id.

    A row whose length (`lengths` [T]) is 0 is padding: it gets id -1 and weight 0.
    """
    probabilities, ids = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    topk_ids, topk_weights = ids[:, :top_k].to(torch.int32), probabilities[:, :top_k]
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    if lengths is None:
        return topk_ids, topk_weights
    padding = lengths[:, None] == 0
    return topk_ids.masked_fill(padding, -1), topk_weights.masked_fill(padding, 0.0)
