"""The CPU backend: three ways to the same sum, chosen by the experts' size and the number of rows.

*all at once*: small experts stacked into one matrix, so a layer is two products and no index arithmetic; the rows of
    experts that a token did not choose get weight 0. It reads all weights, and computes E/K times what is needed.
*row by row*: the K experts of each of a few rows, with no sorting.
*grouped*: rows sorted by expert, one product for each expert that any row chose; the others are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.kernels.linear import PackedLinear
from flexmoe.kernels.swiglu import swiglu
from flexmoe.moe.experts.weights import ExpertWeights
from flexmoe.moe.permute import permute

_ROW_BY_ROW = 2  # rows up to which sorting costs more than it saves


class CPUExperts(ExpertWeights):
    """Packed experts; see the module's text for the three paths."""

    def pack(self) -> None:
        self._gate_up = [PackedLinear(w) for w in self.gate_up.data]
        self._down = [PackedLinear(w) for w in self.down.data]
        del self.gate_up, self.down

    def forward(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Tensor:
        if x.shape[0] <= _ROW_BY_ROW:
            return self._row_by_row(x, slot_ids.tolist(), weights.tolist())
        return self._grouped(x, slot_ids, weights)

    def _row_by_row(self, x: Tensor, slot_ids: list[list[int]], weights: list[list[float]]) -> Tensor:
        out = torch.zeros_like(x)
        for i, slots in enumerate(slot_ids):
            row, total = x[i : i + 1], out[i : i + 1]
            for slot, weight in zip(slots, weights[i], strict=True):
                if slot >= 0:
                    total.add_(self._down[slot](swiglu(self._gate_up[slot](row))), alpha=weight)
        return out

    def _grouped(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Tensor:
        chosen = permute(slot_ids, weights, self.num_slots)
        gathered = x.index_select(0, chosen.rows)
        start = 0
        for slot, count in enumerate(chosen.counts):
            if count:
                part = gathered[start : start + count]
                part.copy_(self._down[slot](swiglu(self._gate_up[slot](part))))
                start += count
        gathered.mul_(chosen.weights[:, None])
        return torch.zeros_like(x).index_add_(0, chosen.rows, gathered)
