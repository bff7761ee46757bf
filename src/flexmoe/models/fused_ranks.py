"""What the ranks of a fused decode step exchange. Enters: a mesh, and what a rank computed. Leaves: sums over ranks.

Each rank writes what its own heads, columns or experts give to `part`; the sum over the ranks is then added to the
residual stream. Parts travel in the model's dtype, as they do between the layers in torch: half the bytes of fp32, and
each is rounded once. In an all-reduce every rank gets the same bits, so all go on with the same stream, and choose the
same experts and tokens, without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.moe.slots import SlotTable
from flexmoe.parallel.mesh import Mesh


class SharedSums:
    """Adds what ranks compute together to the residual stream x [T, H], fp32."""

    def __init__(self, mesh: Mesh, hidden_size: int, dtype: torch.dtype, device: torch.device, max_rows: int) -> None:
        self._tensor, self._stage = mesh.tp, mesh.stage
        self._part = torch.empty(max_rows, hidden_size, dtype=dtype, device=device)

    def part(self, rows: int) -> Tensor:
        """Where this rank's part goes: [rows, H]."""
        return self._part[:rows]

    def begin(self, x: Tensor) -> None:
        """x = the sum of the embeddings that each rank has some of."""
        x.copy_(self._tensor.all_reduce(self.part(len(x)), "embedding"))

    def add_product(self, x: Tensor) -> None:
        """x += the sum of a product whose columns the tensor group shares."""
        x += self._tensor.all_reduce(self.part(len(x)), "linear")

    def add_experts(self, x: Tensor) -> None:
        """x += the sum of what the experts of all ranks of the stage give."""
        x += self._stage.all_reduce(self.part(len(x)), "combine")


def slots_by_row(mesh: Mesh, num_experts: int, layer: int, max_rows: int, device: torch.device) -> Tensor | None:
    """The slot on this rank that row t takes for expert e, int32 [max_rows, E], -1 where another rank computes it.

    None if all experts are here and in order, so that a slot is an expert.
    """
    placement = mesh.plan.placement(num_experts, layer)
    if placement.slots == (tuple(range(num_experts)),):
        return None
    every = torch.arange(num_experts, device=device).expand(max_rows, num_experts)
    slots = SlotTable(placement, device).on_rank(every, mesh.place.ep).int()
    alike = all(len(placement.replicas(expert)) == 1 for expert in range(num_experts))
    return slots[:1].clone().expand_as(slots) if alike else slots
