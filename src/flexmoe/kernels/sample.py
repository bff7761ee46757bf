"""Choose a token a row from its logits. Enters: logits [T, V] and the numbers of SampleParams. Leaves: tokens [T].

The torch references of the kernels that do this inside a CUDA graph; they sort, and say what is meant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this temperature fp32 cannot divide by it; the draw has long been greedy.
COLDEST = 1e-30


@dataclass(frozen=True, slots=True)
class SampleParams:
    """What each row asks for, a contiguous tensor [T] of each kind.

    temperature, fp32: 0 takes the argmax of the row as it is; so raise a colder one to COLDEST before it becomes fp32.
    top_k, int32: 0 or less keeps all. top_p, fp32 or fp64: 1 keeps all. min_p, fp32: 0 keeps all.
    uniform, fp64: the row's random number in [0, 1).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row of logits [T, V], of equal ones the lowest; -1 if the row holds a NaN: [T]."""
    best = logits.argmax(-1)
    return best.masked_fill(logits.isnan().any(-1), -1)


def sample(logits: Tensor, params: SampleParams) -> Tensor:
    """Tokens [T] of logits [T, V], fp32: greedy where the temperature is 0, else drawn. -1 if no number results.

    A drawn token is the first, in the order of the vocabulary, at which the running sum of the weights left passes
    uniform times their total. Each filter is a threshold, so equally likely tokens stay or go together.
    """
    weights = _weights(logits, params)
    running = weights.double().cumsum(-1)  # [T, V]
    total = running[:, -1:]
    drawn = torch.searchsorted(running, params.uniform[:, None] * total, right=True).clamp(max=logits.shape[1] - 1)
    drawn = torch.where(total.isfinite(), drawn, -1)[:, 0]
    return torch.where(params.temperature == 0.0, greedy(logits), drawn)


def _weights(logits: Tensor, params: SampleParams) -> Tensor:
    """exp((logit - largest) / temperature) where top_k, top_p of what it left, and min_p keep the token: [T, V]."""
    work = (logits - logits.amax(-1, keepdim=True)) / params.temperature.clamp(min=COLDEST)[:, None]
    weights = work.exp()
    best = work.sort(-1, descending=True).values  # [T, V]
    k = params.top_k.long()[:, None]
    kth = best.gather(1, (k - 1).clamp(0, logits.shape[1] - 1))
    weights = weights * (work >= torch.where(k > 0, kth, -math.inf))
    share = best.exp() / weights.sum(-1, keepdim=True, dtype=torch.float64)
    before = share.cumsum(-1) - share  # of each token: how likely are those more likely than it
    p = params.top_p.double()[:, None]
    last = ((before < p).sum(-1, keepdim=True) - 1).clamp(min=0)
    weights = weights * (work >= torch.where(p < 1.0, best.gather(1, last), -math.inf))
    return weights * (weights >= params.min_p[:, None])
