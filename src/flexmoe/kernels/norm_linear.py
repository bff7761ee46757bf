"""RMS norm, linear map, bias, residual: the operation around every dense projection of a decode step, in plain torch.

Enters: rows x [T, K] and a weight [N, K]. Leaves: [T, N]. `kernels/triton/norm_linear.py` is tested against this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: bool = False,
) -> None:
    """out = rms_norm(x) W^T + bias, or out += that if `residual`. All in fp32, but for the rounding to out's dtype.

    x: [T, K]. weight: [N, K]. out: [T, N]. norm_weight: [K], or None for no norm. bias: [N].
    """
    rows = x.float()
    if norm_weight is not None:
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    result = F.linear(rows, weight.float(), None if bias is None else bias.float())
    out.copy_(out.float() + result if residual else result)
