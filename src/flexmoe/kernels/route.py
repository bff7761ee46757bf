"""Norm of a row and its product with the router: plain torch, the reference of the Triton kernels.

Enters: rows of the residual stream, fp32 [T, H]. Leaves: the normalised rows, which the experts read, and the logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(x: Tensor, norm_weight: Tensor, eps: float, router_weight: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [T, H], norm_weight [H] in the model's dtype, router_weight [E, H] -> normed [T, H], logits fp32 [T, E].

    Rounded to the model's dtype where a model that computes in it would be: after scaling and after the norm's weight.
    The product with the router is fp32, of the rows as rounded.
    """
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = (x * scale).to(norm_weight.dtype) * norm_weight
    return normed, F.linear(normed.float(), router_weight.float())
