"""Index arithmetic between tokens and experts: sort assignments by slot, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Permutation:
    """Assignments (token, k) sorted by slot, ties by token, so that every sum over experts has one fixed order.

    rows: [M] the token of each; weights: [M]; counts: how many each slot got (those with slot -1 are left out).
    """

    rows: Tensor
    weights: Tensor
    counts: list[int]


def permute(slot_ids: Tensor, weights: Tensor, num_slots: int) -> Permutation:
    """Sort slot_ids [T, K] (-1: not here) with their weights [T, K]."""
    flat = slot_ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=num_slots + 1).tolist()
    order = order[counts[0] :]
    return Permutation(order // slot_ids.shape[1], weights.reshape(-1)[order], counts[1:])
