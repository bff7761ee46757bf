"""What the ranks of a fused decode step exchange. Enters: a mesh, and what a rank computed. Leaves: sums over ranks.

Each rank writes what its own heads, columns or experts give to `part`; the sum over the ranks is then added to the
residual stream. Parts travel in the model's dtype, as they do between the layers in torch: half the bytes of fp32, and
each is rounded once. Every rank gets the same bits, so all go on with the same stream, and choose the same experts and
tokens, without a word.

Where GPUs can read each other's memory a sum is one launch, which norms the rows for what comes next as well
(`OneShotSums`); elsewhere, and for parts so large that sending them once to everybody costs more, it is an all-reduce
of torch.distributed (`SharedSums`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.config.plan import ExpertPlacement
from flexmoe.kernels.decode_attention import QKNormWeights
from flexmoe.kernels.triton.all_reduce import PeerRows, all_reduce
from flexmoe.kernels.triton.norm_linear import NormAfter
from flexmoe.kernels.triton.qk_norm_over_ranks import norm_by_sums, qk_norm_over_ranks, sum_squares
from flexmoe.moe.slots import SlotTable
from flexmoe.parallel.comm import Group
from flexmoe.parallel.mesh import Mesh
from flexmoe.parallel.peers import share, why_not_shared

MOST_ONE_SHOT = 16 << 20  # bytes that a rank reads of the others; an all-reduce in rings sends less of large parts


def norm_over_ranks(qkv: Tensor, norm: QKNormWeights, group: Group) -> None:
    """Queries and keys of qkv [T, (Hq + 2 Hkv) D] are normed over the heads of the group's ranks, in place."""
    norm_by_sums(qkv, group.all_reduce(sum_squares(qkv, norm), "qk_norm"), norm, group.size)


class SharedSums:
    """Adds what ranks compute together to the residual stream x [T, H], fp32. how: in words, for people."""

    how = "all-reduce"

    def __init__(self, mesh: Mesh, hidden_size: int, dtype: torch.dtype, device: torch.device, max_rows: int) -> None:
        self._tensor, self._stage = mesh.tp, mesh.stage
        self._experts = mesh.tp if mesh.dp.size > 1 else mesh.stage  # of which data ranks add up before
        self._part = torch.empty(max_rows, hidden_size, dtype=dtype, device=device)

    def start(self) -> None:
        """A step begins."""

    def part(self, rows: int) -> Tensor:
        """Where this rank's part of the next sum goes: [rows, H]."""
        return self._part[:rows]

    def norms(self, rows: int) -> bool:
        """Whether `add_product` and `add_experts` of so many rows can do a `NormAfter`."""
        return False

    def norm_heads(self, qkv: Tensor, norm: QKNormWeights) -> None:
        """Queries and keys of qkv [T, (Hq + 2 Hkv) D] are normed over the heads of all ranks, in place."""
        norm_over_ranks(qkv, norm, self._tensor)

    def begin(self, x: Tensor) -> None:
        """x = the sum of the embeddings that each rank has some of."""
        x.copy_(self._tensor.all_reduce(self.part(len(x)), "embedding"))

    def add_product(self, x: Tensor, norm: NormAfter | None = None) -> None:
        """x += the sum of a product whose columns the tensor group shares."""
        assert norm is None
        x += self._tensor.all_reduce(self.part(len(x)), "linear")

    def add_experts(self, x: Tensor, norm: NormAfter | None = None) -> None:
        """x += the sum of what the experts give, of all ranks that have these rows."""
        assert norm is None
        x += self._experts.all_reduce(self.part(len(x)), "combine")


class OneShotSums(SharedSums):
    """The same by reading the other ranks' parts, for groups that are all ranks of the stage.

    Parts are written in two memories in turn. Whoever has done a sum knows that all ranks had begun it, and so were
    done with the one before, whose memory comes next. A step begins with the first; between it and the sum that the
    step before ended with all ranks exchange the tokens they chose.
    """

    how = "one launch"

    def __init__(
        self, mesh: Mesh, hidden_size: int, dtype: torch.dtype, device: torch.device, max_rows: int, *, pdl: bool
    ) -> None:
        super().__init__(mesh, hidden_size, dtype, device, max_rows)
        self._pdl, self._turn, self._memories = pdl, 0, []
        for _ in range(2):
            self._memories.append(peers_of(self._stage, max_rows, hidden_size, dtype, device))
        self._squares = peers_of(self._stage, max_rows, 2, torch.float32, device)  # two sums lie between its uses

    def start(self) -> None:
        self._turn = 0

    def norm_heads(self, qkv: Tensor, norm: QKNormWeights) -> None:
        if not self.norms(len(qkv)):
            super().norm_heads(qkv, norm)
            return
        self._stage.traffic.count("qk_norm", (self._stage.size - 1) * len(qkv) * 2 * 4)
        qk_norm_over_ranks(self._squares, qkv, norm, pdl=self._pdl)

    def part(self, rows: int) -> Tensor:
        return self._memories[self._turn].part[:rows] if self.norms(rows) else super().part(rows)

    def norms(self, rows: int) -> bool:
        """Small parts are exchanged like that."""
        return (self._stage.size - 1) * rows * self._part.shape[1] * self._part.itemsize <= MOST_ONE_SHOT

    def begin(self, x: Tensor) -> None:
        if self.norms(len(x)):
            self._sum(x, "embedding", None, accumulate=False)
        else:
            super().begin(x)

    def add_product(self, x: Tensor, norm: NormAfter | None = None) -> None:
        if self.norms(len(x)):
            self._sum(x, "linear", norm)
        else:
            super().add_product(x)

    def add_experts(self, x: Tensor, norm: NormAfter | None = None) -> None:
        if self.norms(len(x)):
            self._sum(x, "combine", norm)
        else:
            super().add_experts(x)

    def _sum(self, x: Tensor, label: str, norm: NormAfter | None, *, accumulate: bool = True) -> None:
        memory = self._memories[self._turn]
        self._stage.traffic.count(label, (self._stage.size - 1) * x.numel() * memory.part.itemsize)
        all_reduce(memory, x, accumulate=accumulate, norm=norm, pdl=self._pdl)
        self._turn = 1 - self._turn


def sums_of(
    mesh: Mesh, hidden_size: int, dtype: torch.dtype, device: torch.device, max_rows: int, *, pdl: bool
) -> SharedSums | None:
    """How the ranks that have the same rows add up; None for one rank. All of the stage call this together."""
    if mesh.tp.size == 1:
        return None
    why_not = why_not_shared(mesh.stage, device, one_machine=mesh.machine_size == mesh.plan.num_ranks)
    if mesh.tp.size == mesh.stage.size and not why_not:
        return OneShotSums(mesh, hidden_size, dtype, device, max_rows, pdl=pdl)
    sums = SharedSums(mesh, hidden_size, dtype, device, max_rows)
    sums.how = f"all-reduce: {why_not}" if why_not else "all-reduce"
    return sums


def peers_of(group: Group, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> PeerRows:
    """Memory of so many rows on each rank of the group, which all call this together, after `why_not_shared`."""
    shared = share(group, rows, width, dtype, device)
    return PeerRows(shared.own, shared.rows, shared.flags, group.index)


class SlotsByRow:
    """The slot on this rank that row t takes for expert e: int32 [T, E], -1 where another rank computes it.

    Made once a layer: the host waits while a placement's table is copied to the device.
    """

    def __init__(self, placement: ExpertPlacement, rank: int, device: torch.device) -> None:
        self._table, self._rank = SlotTable(placement, device), rank
        self._every = torch.arange(placement.num_experts, device=device)[None]  # [1, E]
        alike = all(len(placement.replicas(expert)) == 1 for expert in range(placement.num_experts))
        self._each = self._of(1) if alike else None

    def _of(self, rows: int) -> Tensor:
        return self._table.on_rank(self._every.expand(rows, -1), self._rank).int()

    def rows(self, count: int) -> Tensor:
        """Of rows 0 to count - 1 of a step."""
        return self._of(count) if self._each is None else self._each.expand(count, -1)


def slots_by_row(mesh: Mesh, num_experts: int, layer: int, device: torch.device) -> SlotsByRow | None:
    """None if all experts are here and in order, so that a slot is an expert."""
    placement = mesh.plan.placement(num_experts, layer)
    if placement.slots == (tuple(range(num_experts)),):
        return None
    return SlotsByRow(placement, mesh.place.ep, device)
