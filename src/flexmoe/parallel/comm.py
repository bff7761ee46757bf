"""Collectives over torch.distributed. Enters: tensors of one rank. Leaves: what the ranks of a group make of them.

In a group of one rank nothing happens, and nothing is counted. Every collective of a larger one is counted: the bytes
that this rank sends, under a label that says what for, and a beat that tells whoever watches that work goes on.

Bytes are those of the algorithms that send least: an all-reduce of n bytes over P ranks sends 2 (P-1)/P n from each, an
all-gather or reduce-scatter to or from n bytes in all (P-1)/P n, an all-to-all what goes to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# New names of the same operations; torch 2.13 warns of the old ones, 2.11 has no others.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_MILESTONE = 2**20  # more collectives than any rank begins in a step; 2^44 milestones last longer than any process


@dataclass(slots=True)
class Traffic:
    """What one rank has sent, in bytes by label, and how far it has come: beats[0] counts the collectives begun.

    Ranks that begin different numbers of them meet at milestones, which count for more than any collectives.
    """

    sent: dict[str, float] = field(default_factory=dict)
    beats: MutableSequence[int] = field(default_factory=lambda: [0])

    def count(self, label: str, num_bytes: float) -> None:
        self.sent[label] = self.sent.get(label, 0) + num_bytes
        self.beats[0] += 1

    @contextmanager
    def aside(self) -> Iterator[dict[str, float]]:
        """What is counted within goes to the dictionary that is yielded, which is full at the end, and nowhere else."""
        kept, self.sent = self.sent, {}
        found = self.sent
        try:
            yield found
        finally:
            self.sent = kept

    def repeat(self, sent: Mapping[str, float]) -> None:
        """Count what a replayed graph sends, which nobody sees it do."""
        for label, num_bytes in sent.items():
            self.count(label, num_bytes)

    def take(self) -> dict[str, float]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, {}
        return sent

    @property
    def milestone(self) -> int:
        """The last one reached."""
        return self.beats[0] // _MILESTONE

    def reach(self, milestone: int) -> None:
        """Say that the rank has come so far; going back is not said."""
        self.beats[0] = max(self.beats[0], milestone * _MILESTONE)


class Group:
    """Ranks that work together; `index` is this one's place among them.

    Without a handle it stands for ranks that are not there: results have the right shapes, not the right values. So
    one rank's share can be run, and timed, alone.
    """

    def __init__(
        self, size: int = 1, index: int = 0, handle: dist.ProcessGroup | None = None, traffic: Traffic | None = None
    ) -> None:
        self.size, self.index = size, index
        self.handle = handle
        self.traffic = traffic or Traffic()

    def _skips(self, x: Tensor, label: str) -> bool:
        """Whether there is nothing to exchange: with one rank, or where x is empty, and so it is on all ranks.

        The latter counts as begun: data ranks that have rows begin it.
        """
        if self.size > 1 and not x.numel():
            self.traffic.count(label, 0)
        return self.size == 1 or not x.numel()

    def all_reduce(self, x: Tensor, label: str) -> Tensor:
        """The sum over the ranks, the same bits on all of them; in place if x is contiguous."""
        if self._skips(x, label):
            return x
        self.traffic.count(label, 2 * (self.size - 1) * _bytes(x) / self.size)
        x = x.contiguous()
        if self.handle is not None:
            dist.all_reduce(x, group=self.handle)
        return x

    def all_gather(self, x: Tensor, label: str) -> Tensor:
        """x [n, ...] of every rank, one after the other: [P n, ...]."""
        if self._skips(x, label):
            return x
        self.traffic.count(label, (self.size - 1) * _bytes(x))
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        if self.handle is None:
            return out.copy_(x.repeat(self.size, *[1] * (x.dim() - 1)))
        _all_gather(out, x.contiguous(), group=self.handle)
        return out

    def reduce_scatter(self, x: Tensor, label: str) -> Tensor:
        """Of the sum of x [P n, ...] over the ranks this one's part [n, ...]."""
        if self._skips(x, label):
            return x
        self.traffic.count(label, (self.size - 1) * _bytes(x) / self.size)
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        if self.handle is None:
            return out.copy_(x[: out.shape[0]])
        _reduce_scatter(out, x.contiguous(), group=self.handle)
        return out

    def exchange_counts(self, send: Sequence[int], device: torch.device, label: str) -> list[int]:
        """send[i]: rows for rank i. Returns how many rows each rank has for this one; the host waits for them."""
        if self.size == 1:
            return list(send)
        mine = torch.tensor(send, device=device)
        self.traffic.count(label, (self.size - 1) * mine.itemsize)
        if self.handle is None:
            return list(send)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.handle)
        found: list[int] = theirs.tolist()
        return found

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], label: str) -> Tensor:
        """Rows x [sum(send), ...], in the order of the ranks they go to; returns [sum(receive), ...] in that order.

        receive: of exchange_counts. A rank may send nothing, or get nothing; all must call.
        """
        assert sum(send) == x.shape[0], f"{x.shape[0]} rows, but counts of {sum(send)}"
        if self.size == 1:
            return x
        per_row = _bytes(x) // x.shape[0] if x.shape[0] else 0
        self.traffic.count(label, (sum(send) - send[self.index]) * per_row)
        out = x.new_zeros(sum(receive), *x.shape[1:])
        if self.handle is not None:
            dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self.handle)
        return out

    def gather(self, x: Tensor, label: str) -> Tensor | None:
        """x [n, ...] of every rank on the first: [P, n, ...]; None on the others."""
        if self.size == 1:
            return x[None]
        self.traffic.count(label, 0 if self.index == 0 else _bytes(x))
        out = x.new_empty(self.size, *x.shape) if self.index == 0 else None
        if self.handle is None:
            return None if out is None else out.copy_(x.expand_as(out))
        dist.gather(x.contiguous(), None if out is None else list(out), group=self.handle, group_dst=0)
        return out

    def broadcast(self, x: Tensor, root: int, label: str) -> Tensor:
        """The root's x, in place."""
        if self.size > 1:
            self.traffic.count(label, _bytes(x) if self.index == root else 0)
            if self.handle is not None:
                dist.broadcast(x, group=self.handle, group_src=root)
        return x

    def send(self, x: Tensor, to: int, label: str) -> None:
        """Give x to a rank that calls `receive` for it."""
        self.traffic.count(label, _bytes(x))
        if self.handle is not None and x.numel():
            dist.send(x.contiguous(), group=self.handle, group_dst=to)

    def receive(self, x: Tensor, source: int, label: str) -> Tensor:
        """Fill x with what `source` sends."""
        self.traffic.count(label, 0)
        if self.handle is not None and x.numel():
            dist.recv(x, group=self.handle, group_src=source)
        return x

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest value of any rank."""
        if self.size == 1 or self.handle is None:
            return value
        found = torch.tensor(value, device=device)
        self.traffic.count("control", 2 * (self.size - 1) * found.itemsize / self.size)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.handle)
        return int(found.item())


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
