"""SlotTable: from a logical expert to the rank and physical slot that compute it. Enters: a placement.

An expert with several replicas is shared out by the rows: row i of a step takes the one with number i modulo their
count. So all ranks agree without a word, and a crowd that wants one expert spreads evenly over its replicas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.config.plan import ExpertPlacement


class SlotTable:
    """Looks up topk_ids [T, K]. E logical experts, at most R replicas of one."""

    def __init__(self, placement: ExpertPlacement, device: torch.device, *, near: int | None = None) -> None:
        """near: the rank whose replicas go before others, for rows that start there."""
        places = [placement.replicas(expert) for expert in range(placement.num_experts)]
        if near is not None:
            places = [tuple(p for p in found if p[0] == near) or found for found in places]
        most = max(map(len, places))
        table = [[found[i % len(found)] for i in range(most)] for found in places]
        self._table = torch.tensor(table, device=device)  # [E, R, 2]
        self._counts = torch.tensor([len(found) for found in places], device=device)  # [E]
        self._single = most == 1

    def look_up(self, topk_ids: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """Ranks [T, K] and slots [T, K] of topk_ids, whose first row is number `first_row` of the step."""
        if self._single:
            place = self._table[topk_ids, 0]
        else:
            rows = torch.arange(first_row, first_row + topk_ids.shape[0], device=topk_ids.device)[:, None]
            place = self._table[topk_ids, rows % self._counts[topk_ids]]
        return place[..., 0], place[..., 1]

    def on_rank(self, topk_ids: Tensor, rank: int) -> Tensor:
        """Slots [T, K] of topk_ids on `rank`, -1 for what is computed elsewhere."""
        ranks, slots = self.look_up(topk_ids)
        return slots.masked_fill(ranks != rank, -1)
