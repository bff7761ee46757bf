"""The CPU backend in torch: two ways to the same sum, chosen by the number of rows. Both skip experts no row chose.

*row by row*: the K experts of each of a few rows, with no sorting.
*grouped*: rows sorted by expert, one product for each expert that any row chose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmoe.kernels.linear import PackedLinear, QuantizedLinear
from flexmoe.kernels.swiglu import swiglu
from flexmoe.moe.experts.weights import ExpertWeights
from flexmoe.moe.permute import permute

_ROW_BY_ROW = 2  # rows up to which sorting costs more than it saves


class CPUExperts(ExpertWeights):
    """Packed experts; see the module's text for the two paths."""

    _gate_up: Sequence[PackedLinear | QuantizedLinear]
    _down: Sequence[PackedLinear | QuantizedLinear]

    def pack(self, *, prepack: bool) -> None:
        if self.quantized:
            slots = range(self.num_slots)
            self._gate_up = [QuantizedLinear(self.quantized["gate_up"][slot]) for slot in slots]
            self._down = [QuantizedLinear(self.quantized["down"][slot]) for slot in slots]
            return
        self._gate_up = [PackedLinear(w, prepack=prepack) for w in self.gate_up.data]
        self._down = [PackedLinear(w, prepack=prepack) for w in self.down.data]
        if prepack:
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
