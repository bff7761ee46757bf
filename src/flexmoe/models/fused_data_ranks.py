"""Rows of all data ranks in a fused decode step, for the experts of each. Enters: normed rows. Leaves: sums of these.

Each data rank has T rows of its own, padded alike, so that no shape depends on the routing: [R T, H] are gathered, each
rank's experts give their part of all of them, and the sum over ranks of its own T comes back to each.

Where GPUs can read each other's memory either is one launch (`OneShotRows`); elsewhere, and for rows so many that
sending parts to everybody costs more, it is an all-gather or a reduce-scatter of torch.distributed (`GatheredRows`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.kernels.triton.all_reduce import PeerRows, all_reduce
from flexmoe.kernels.triton.combine import combine_norm
from flexmoe.kernels.triton.gather_rows import gather_rows
from flexmoe.kernels.triton.norm_linear import NormAfter
from flexmoe.models.decoder import Decoder
from flexmoe.models.fused_ranks import MOST_ONE_SHOT, peers_of
from flexmoe.parallel.mesh import Mesh
from flexmoe.parallel.peers import why_not_shared


class GatheredRows:
    """Gathers rows and adds up sums. how: in words, for people. max_rows: of all data ranks.

    normed: [max_rows / R, H], where the rows that are gathered have to be.
    """

    how = "all-gather"

    def __init__(self, mesh: Mesh, hidden_size: int, dtype: torch.dtype, device: torch.device, max_rows: int) -> None:
        """max_rows: of one data rank."""
        self._data, self.max_rows = mesh.dp, mesh.dp.size * max_rows
        self._part = torch.empty(self.max_rows, hidden_size, dtype=dtype, device=device)
        self.normed = torch.empty(max_rows, hidden_size, dtype=dtype, device=device)

    def lengths(self, own: Tensor) -> Tensor:
        """1 for rows and 0 for padding, of all data ranks: int32 [R T]. own: the lengths of these rows, [T]."""
        return self._data.all_gather(own, "routing").clamp(max=1)

    def rows(self, count: int) -> Tensor:
        """The first `count` of `normed` of all data ranks, one after the other: [R T, H]."""
        return self._data.all_gather(self.normed[:count], "dispatch")

    def own(self, count: int) -> slice:
        """Which of the rows of all are this data rank's, if each has so many."""
        return slice(self._data.index * count, (self._data.index + 1) * count)

    def part(self, count: int) -> Tensor:
        """Where what this rank's experts give for all rows goes, if each data rank has so many: [R T, H]."""
        return self._part[: self._data.size * count]

    def own_sums(self, count: int) -> Tensor:
        """Of the sum over data ranks of their parts the own rows: [T, H]."""
        return self._data.reduce_scatter(self.part(count), "combine")

    def add(self, x: Tensor, norm: NormAfter) -> None:
        """x [T, H] += the own sums, and norm.out = norm(x)."""
        # Without PDL: what is launched behind a collective begins when that has ended.
        combine_norm(self.own_sums(len(x)), None, x, norm.weight, norm.eps, norm.out)

    def may_overlap(self, count: int) -> bool:
        """Whether what is launched behind `rows` may begin before it has ended, as a kernel of ours allows."""
        return False


class OneShotRows(GatheredRows):
    """The same by reading the other ranks' memory, for data ranks that are all ranks of the stage.

    Rows and parts have a memory each. Whoever has done one exchange knows that all ranks had begun it, and so were done
    with the one before: rows may be written again once their sums are there, parts once the next rows are.
    """

    how = "one launch"

    def __init__(
        self, mesh: Mesh, hidden_size: int, dtype: torch.dtype, device: torch.device, max_rows: int, *, pdl: bool
    ) -> None:
        super().__init__(mesh, hidden_size, dtype, device, max_rows)
        self._pdl = pdl
        self._lengths = peers_of(self._data, max_rows, 1, torch.int32, device)
        self._rows = peers_of(self._data, max_rows, hidden_size, dtype, device)
        self._parts = peers_of(self._data, self.max_rows, hidden_size, dtype, device)
        self.normed = self._rows.part
        self._gathered = torch.empty(self.max_rows, hidden_size, dtype=dtype, device=device)
        self._gathered_lengths = torch.empty(self.max_rows, 1, dtype=torch.int32, device=device)

    def lengths(self, own: Tensor) -> Tensor:
        self._lengths.part[: len(own), 0].copy_(own)  # no kernel, so that none can begin before it has ended
        return self._gather(self._lengths, self._gathered_lengths, len(own), "routing", pdl=False).flatten()

    def rows(self, count: int) -> Tensor:
        if self._is_small(count):
            return self._gather(self._rows, self._gathered, count, "dispatch", pdl=self._pdl)
        return self._data.all_gather(self.normed[:count].clone(), "dispatch")

    def part(self, count: int) -> Tensor:
        return self._parts.part[: self._data.size * count] if self._is_small(count) else super().part(count)

    def add(self, x: Tensor, norm: NormAfter) -> None:
        count = len(x)
        if not self._is_small(count):
            super().add(x, norm)
            return
        self._data.traffic.count("combine", (self._data.size - 1) * x.numel() * self._parts.part.itemsize)
        all_reduce(self._parts, x, accumulate=True, norm=norm, first=self.own(count).start, pdl=self._pdl)

    def may_overlap(self, count: int) -> bool:
        return self._is_small(count)

    def _gather(self, peers: PeerRows, out: Tensor, count: int, label: str, *, pdl: bool) -> Tensor:
        found = out[: self._data.size * count]
        self._data.traffic.count(label, (self._data.size - 1) * count * out.shape[1] * out.itemsize)
        gather_rows(peers, found, pdl=pdl)
        return found

    def _is_small(self, count: int) -> bool:
        """Small parts are exchanged like that."""
        return (self._data.size - 1) * count * self.normed.shape[1] * self.normed.itemsize <= MOST_ONE_SHOT


def gathered_of(
    model: Decoder, dtype: torch.dtype, device: torch.device, max_rows: int, *, pdl: bool
) -> GatheredRows | None:
    """None for one data rank, and for a model without experts, whose data ranks have nothing to tell each other.

    All ranks of the stage call this together.
    """
    mesh, config = model.mesh, model.config
    if mesh.dp.size == 1 or config.moe is None:
        return None
    why_not = why_not_shared(mesh.stage, device, one_machine=mesh.machine_size == mesh.plan.num_ranks)
    if mesh.dp.size == mesh.stage.size and not why_not:
        return OneShotRows(mesh, config.hidden_size, dtype, device, max_rows, pdl=pdl)
    found = GatheredRows(mesh, config.hidden_size, dtype, device, max_rows)
    found.how = f"all-gather: {why_not}" if why_not else "all-gather"
    return found
