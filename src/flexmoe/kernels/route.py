"""Norm of a row and its product with the router: plain torch, the reference of the Triton kernels.

Enters: rows of the residual stream, fp32 [T, H]. Leaves: the normalised rows, which the experts read, and the logits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flexmoe.kernels.rms_norm import rms_norm


def route(x: Tensor, norm_weight: Tensor, eps: float, router_weight: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [T, H], norm_weight [H] in the model's dtype, router_weight [E, H] -> normed [T, H], logits fp32 [T, E].

    The rows are rounded once, after the norm, and their product with the router is fp32.
    """
    normed = rms_norm(x, norm_weight, eps).to(norm_weight.dtype)
    return normed, F.linear(normed.float(), router_weight.float())
