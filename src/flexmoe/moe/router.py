"""Router: which K of E experts a token takes, and with which weights. All in fp32, whatever the model's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.config.model import MoEConfig


class Router(nn.Module):
    """x [T, H] -> topk_ids [T, K] int64 (logical experts, best first) and topk_weights [T, K] fp32."""

    def __init__(self, hidden_size: int, config: MoEConfig, *, device: torch.device) -> None:
        super().__init__()
        self.top_k, self.renormalize = config.top_k, config.renormalize
        weight = torch.empty(config.num_experts, hidden_size, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), self.weight)  # [T, E]
        return softmax_topk(logits, self.top_k, self.renormalize)


def softmax_topk(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all E experts, then the K largest; equal probabilities go to the lower expert id.

    A stable sort and not torch.topk, which leaves the order of ties open.
    """
    weights, ids = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    topk_ids, topk_weights = ids[:, :top_k], weights[:, :top_k]
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    return topk_ids, topk_weights
