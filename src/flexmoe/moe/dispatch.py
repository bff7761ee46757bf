"""TokenDispatcher: WHERE the work of a MoE layer happens. It has no weights, so it is no module.

Enters: all rows of this rank with their logical experts. Leaves: the rows whose experts are in this rank's physical
slots; after the experts, the weighted sums, one a token, in the order they came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexmoe.config.plan import ExpertPlacement


@dataclass(frozen=True, slots=True)
class Routed:
    """Rows to compute here. x [R, H]; slot_ids [R, K] int64 physical slots, -1 for "not here"; weights [R, K] fp32."""

    x: Tensor
    slot_ids: Tensor
    weights: Tensor


class TokenDispatcher(Protocol):
    """Brings tokens to their experts and the results back."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Routed:
        """x [T, H], topk_ids and topk_weights [T, K] -> the rows to compute on this rank."""

    def combine(self, out: Tensor, routed: Routed) -> Tensor:
        """out [R, H] -> [T, H], the sum over all ranks for each token."""


class LocalDispatcher:
    """All experts live here: rows stay, logical experts become the slots that hold them."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        slots = [placement.slots_of(expert, rank=0)[0] for expert in range(placement.num_experts)]
        self.slot_of = torch.tensor(slots, device=device)  # [E] physical slot of each logical expert
        self._in_order = slots == list(range(placement.num_experts))

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Routed:
        slot_ids = topk_ids if self._in_order else self.slot_of[topk_ids]
        return Routed(x, slot_ids, topk_weights)

    def combine(self, out: Tensor, routed: Routed) -> Tensor:
        return out
