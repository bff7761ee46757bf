"""The K best experts of each row, by softmax probability, ties to the lower id; and the same for one row, inlined.

Enters: logits fp32 [T, E]. Leaves: `topk` writes expert ids and weights [T, K]; `select_expert`, a device function for
the prologue of other kernels, gives the k-th choice of one row and so saves them a launch.

Two ways. By rank: an expert's rank is the number of experts before it, counted by comparing all pairs at once; one
step, good for one row. By rounds: K times the best of what is left; less work, good for many rows or experts.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _comparable(probability: Any) -> Any:
    """NaN stands before all, as torch sorts it; so a row of NaN still chooses K different experts."""
    return tl.where(probability != probability, 2.0, probability)


@triton.jit
def _softmax(logits: Any, valid: Any) -> Any:
    """Probabilities of one row [BLOCK_E] fp32, -1 where not valid."""
    exponential = tl.where(valid, tl.exp(logits - tl.max(logits, 0)), 0.0)
    return tl.where(valid, exponential / tl.sum(exponential, 0), -1.0)


@triton.jit
def _rank(probability: Any, BLOCK_E: tl.constexpr) -> Any:
    """[BLOCK_E] -> how many are larger, or equal with a lower id. [other, expert]: summed over rows, no shuffles."""
    ids = tl.arange(0, BLOCK_E)
    value = _comparable(probability)
    other = value[:, None]
    before = (other > value[None, :]) | ((other == value[None, :]) & (ids[:, None] < ids[None, :]))
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def select_expert(
    logits_ptr: Any, E: Any, BLOCK_E: tl.constexpr, K: tl.constexpr, k: Any, RENORMALIZE: tl.constexpr
) -> Any:
    """The k-th choice among E <= BLOCK_E <= 256 experts for the row at logits_ptr: (expert int32, weight fp32).

    K: how many share the weight if RENORMALIZE. Whatever the logits (NaN too), the expert is within 0..E-1.
    """
    ids = tl.arange(0, BLOCK_E)
    logits = tl.load(logits_ptr + ids, mask=ids < E, other=float("-inf")).to(tl.float32)
    probability = _softmax(logits, ids < E)
    rank = _rank(probability, BLOCK_E)
    expert = tl.sum(tl.where(rank == k, ids, 0), 0)
    weight = tl.sum(tl.where(rank == k, probability, 0.0), 0)
    if RENORMALIZE:
        weight = weight / tl.sum(tl.where(rank < K, probability, 0.0), 0)
    return tl.minimum(expert, E - 1), weight
