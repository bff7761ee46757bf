"""TokenDispatcher: WHERE the work of a MoE layer happens. It has no weights, so it is no module.

Enters: all rows of this rank with their logical experts. Leaves: the rows whose experts are in this rank's physical
slots; after the experts, the weighted sums, one a token, in the order they came.

    Local      one rank holds everything.
    Tensor     every rank holds a slice of every expert (intra-expert) and computes it for all rows; the sum over the
               ranks is the result.
    Expert     every rank holds some experts whole (inter-expert). All rows are on all ranks; each gives its backend
               only the choices that are in its own slots (the others are -1 and never reach a product), and again the
               sum over the ranks is the result. Where each expert is sliced as well, this is the hybrid.
    AllToAll   every rank owns a share of the rows, and sends each once to each rank that holds some of its experts.
               That rank returns one row: the weighted sum of what it found. In the hybrid the ranks that slice the
               same experts first put together what they received.
    Gather     as Tensor or Expert, where data ranks have rows of their own: the rows of all are gathered, and each
               gets back the sums of its own.

All but AllToAll send nothing that depends on the routing: their steps can be captured in a CUDA graph. AllToAll's
cannot: the host waits for the counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.config.plan import ExpertPlacement
from flexmoe.config.shard import block_share
from flexmoe.moe.slots import SlotTable
from flexmoe.parallel.comm import Group
from flexmoe.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Routed:
    """Rows to compute here. x [R, H]; slot_ids [R, K] int64 physical slots, -1 for "not here"; weights [R, K] fp32."""

    x: Tensor
    slot_ids: Tensor
    weights: Tensor


class TokenDispatcher(Protocol):
    """Brings tokens to their experts and the results back."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, most_rows: int | None = None) -> Routed:
        """x [T, H], topk_ids and topk_weights [T, K] -> the rows to compute on this rank.

        most_rows: T of the data rank that has most, if there are several.
        """

    def own(self, x: Tensor) -> Tensor:
        """Of x [T, H] the rows for which this rank computes (its share of) the shared expert: [t, H]."""

    def combine(self, out: Tensor, routed: Routed, shared: Tensor | None = None) -> Tensor:
        """out [R, H] and what the shared expert gave for the own rows [t, H] -> [T, H], the sum over all ranks."""


def make_dispatcher(placement: ExpertPlacement, mesh: Mesh, device: torch.device) -> TokenDispatcher:
    """The dispatcher that the plan asks for, of one layer."""
    if mesh.stage.size == 1:
        return LocalDispatcher(placement, device)
    if mesh.plan.uses_all_to_all:
        return AllToAllDispatcher(placement, mesh, device)
    if mesh.dp.size > 1:
        return GatherDispatcher(placement, mesh, device)
    if mesh.ep.size == 1:
        return TensorDispatcher(placement, mesh.stage, device)
    return ExpertDispatcher(placement, mesh, device)


class LocalDispatcher:
    """All experts live here: rows stay, logical experts become the slots that hold them."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        slots = [placement.slots_of(expert, rank=0)[0] for expert in range(placement.num_experts)]
        self.slot_of = torch.tensor(slots, device=device)  # [E] physical slot of each logical expert
        self._in_order = slots == list(range(placement.num_experts))

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, most_rows: int | None = None) -> Routed:
        slot_ids = topk_ids if self._in_order else self.slot_of[topk_ids]
        return Routed(x, slot_ids, topk_weights)

    def own(self, x: Tensor) -> Tensor:
        return x

    def combine(self, out: Tensor, routed: Routed, shared: Tensor | None = None) -> Tensor:
        return out if shared is None else out + shared


class TensorDispatcher(LocalDispatcher):
    """A slice of every expert lives here: rows stay, and the slices' results are added."""

    def __init__(self, placement: ExpertPlacement, group: Group, device: torch.device) -> None:
        super().__init__(placement, device)
        self._group = group

    def combine(self, out: Tensor, routed: Routed, shared: Tensor | None = None) -> Tensor:
        return self._group.all_reduce(super().combine(out, routed, shared), "combine")


class ExpertDispatcher:
    """Some experts, or slices of some, live here: rows stay, choices of other ranks' experts are left out."""

    def __init__(self, placement: ExpertPlacement, mesh: Mesh, device: torch.device) -> None:
        self._table = SlotTable(placement, device)
        self._group, self._rank = mesh.stage, mesh.place.ep

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, most_rows: int | None = None) -> Routed:
        return Routed(x, self._table.on_rank(topk_ids, self._rank), topk_weights)

    def own(self, x: Tensor) -> Tensor:
        return x

    def combine(self, out: Tensor, routed: Routed, shared: Tensor | None = None) -> Tensor:
        return self._group.all_reduce(out if shared is None else out + shared, "combine")


@dataclass(frozen=True, slots=True)
class Gathered(Routed):
    """Rows of all data ranks, each padded to the same number. num_rows: how many are this one's own."""

    num_rows: int


class GatherDispatcher:
    """Some experts, or slices of some, live here: the rows of all data ranks come, and each gets its own sums back."""

    def __init__(self, placement: ExpertPlacement, mesh: Mesh, device: torch.device) -> None:
        self._table = SlotTable(placement, device)
        self._data, self._heads, self._rank = mesh.dp, mesh.tp, mesh.place.ep

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, most_rows: int | None = None) -> Routed:
        assert most_rows is not None, "data ranks must know how many rows the others have"
        num_rows = x.shape[0]
        padding = (0, 0, 0, most_rows - num_rows)
        ids, weights = F.pad(topk_ids.int(), padding, value=-1), F.pad(topk_weights, padding)
        x = self._data.all_gather(F.pad(x, padding), "dispatch")  # [D m, H], D data ranks, m the most rows
        routing = self._data.all_gather(torch.cat((ids, weights.view(torch.int32)), 1), "routing")  # [D m, 2 K]
        ids, weights = (part.contiguous() for part in routing.chunk(2, 1))
        slots = self._table.on_rank(ids.long().clamp(min=0), self._rank).masked_fill(ids < 0, -1)
        return Gathered(x, slots, weights.view(torch.float32), num_rows)

    def own(self, x: Tensor) -> Tensor:
        return x

    def combine(self, out: Tensor, routed: Routed, shared: Tensor | None = None) -> Tensor:
        assert isinstance(routed, Gathered)
        own = self._data.reduce_scatter(out, "combine")[: routed.num_rows]  # [T, H]
        return self._heads.all_reduce(own if shared is None else own + shared, "combine")


@dataclass(frozen=True, slots=True)
class Sent(Routed):
    """Rows that came from other ranks, and what is needed to send their sums back.

    send, receive: rows to and from each of the ep ranks. place [M]: for each row sent, its target times t plus its
    number among the own rows. sliced: rows that each of the etp ranks received. num_rows: t own rows; of all: T.
    """

    send: list[int]
    receive: list[int]
    place: Tensor
    sliced: list[int]
    num_rows: int
    num_all: int


class AllToAllDispatcher:
    """Some experts, or slices of some, live here: rows go to the ranks of their experts and come back as sums."""

    def __init__(self, placement: ExpertPlacement, mesh: Mesh, device: torch.device) -> None:
        self._table = SlotTable(placement, device, near=mesh.place.ep)
        self._owners, self._ep, self._etp = mesh.tp, mesh.ep, mesh.etp
        self._targets = torch.arange(mesh.ep.size, device=device)

    def own(self, x: Tensor) -> Tensor:
        rows = self._rows(x.shape[0])
        return x[rows.start : rows.stop]

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, most_rows: int | None = None) -> Routed:
        own = self._rows(x.shape[0])
        num_all, x, topk_ids, topk_weights = x.shape[0], *(self.own(t) for t in (x, topk_ids, topk_weights))
        ranks, slots = self._table.look_up(topk_ids, own.start)  # [t, K]
        goes = (ranks[..., None] == self._targets).any(1)  # [t, P]: one copy for each rank, whatever it computes there
        target, row = goes.t().nonzero(as_tuple=True)  # [M], by target, then by row
        send: list[int] = goes.sum(0).tolist()
        receive = self._ep.exchange_counts(send, x.device, "counts")
        slot_ids = slots[row].masked_fill(ranks[row] != target[:, None], -1)
        routing = torch.cat((slot_ids.int(), topk_weights[row].contiguous().view(torch.int32)), 1)  # [M, 2 K]
        x = self._ep.all_to_all(x[row], send, receive, "dispatch")  # [R, H]
        routing = self._ep.all_to_all(routing, send, receive, "routing")
        x, routing, sliced = self._join_slices(x, routing)
        slot_ids, weights = routing.chunk(2, 1)
        place = target * len(own) + row
        weights = weights.contiguous().view(torch.float32)
        return Sent(x, slot_ids.long(), weights, send, receive, place, sliced, len(own), num_all)

    def combine(self, out: Tensor, routed: Routed, shared: Tensor | None = None) -> Tensor:
        assert isinstance(routed, Sent)
        out = self._add_slices(out, routed.sliced)  # [R, H]
        out = self._ep.all_to_all(out, routed.receive, routed.send, "combine")  # [M, H]
        # A place of its own for each sum, then a plain sum over the ranks: the same order each time, with no atomics.
        spread = out.new_zeros(self._ep.size * routed.num_rows, out.shape[1]).index_copy_(0, routed.place, out)
        own = spread.view(self._ep.size, routed.num_rows, out.shape[1]).sum(0)  # [t, H]
        own = own if shared is None else own + shared
        if self._owners.size == 1:
            return own
        size = -(-routed.num_all // self._owners.size)
        whole = self._owners.all_gather(F.pad(own, (0, 0, 0, size - routed.num_rows)), "rows")
        return whole[: routed.num_all]

    def _rows(self, num_all: int) -> range:
        """The own rows, of those that all ranks which share the attention heads have."""
        return block_share(num_all, self._owners.size, self._owners.index)

    def _join_slices(self, x: Tensor, routing: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """What all ranks that slice these experts received, one after the other, and how many rows each."""
        size = self._etp.size
        if size == 1:
            return x, routing, [x.shape[0]]
        mine = [x.shape[0]] * size
        sliced = self._etp.exchange_counts(mine, x.device, "counts")
        x = self._etp.all_to_all(x.repeat(size, 1), mine, sliced, "slice_dispatch")
        return x, self._etp.all_to_all(routing.repeat(size, 1), mine, sliced, "routing"), sliced

    def _add_slices(self, out: Tensor, sliced: list[int]) -> Tensor:
        """Of the sum over the slices' results the rows that this rank received, in one fixed order."""
        size = self._etp.size
        if size == 1:
            return out
        mine = sliced[self._etp.index]
        parts = self._etp.all_to_all(out, sliced, [mine] * size, "slice_combine")
        return parts.view(size, mine, out.shape[1]).sum(0)
