"""Sum over ranks what each of them computed of some rows, add it to the residual stream, and norm that: one launch.

Enters: on each rank, its part of every row, in memory that the other ranks can read. Leaves: the residual stream, the
same bits on all ranks, and its rows normed for what comes next.

"One shot": every rank reads the parts of all others, so P - 1 times a part goes to each, but nobody waits twice. A
program takes a row. It tells the others that this rank's part is there, waits until they have said so too, and reads.
A flag is set by one rank and cleared by the one that waited for it. Nobody says that a part has been read: it may be
written again once a *later* sum over the same ranks, in other memory, is done (`models.fused_ranks.OneShotSums`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.triton.norm_linear import NormAfter


@dataclass(frozen=True, slots=True)
class PeerRows:
    """Where P ranks' rows are: each rank has the same number of them, [rows, H], and flags int32 [P, rows], first 0.

    part: this rank's rows. parts, flags: int64 [P], the addresses of every rank's on this device, which 16 divides.
    """

    part: Tensor
    parts: Tensor
    flags: Tensor
    rank: int

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.parts)


@triton.jit
def tell_and_wait(flags_ptr, row, rows, RANK: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Returns when every rank has come here for this row; what they wrote before can then be read."""
    peers = tl.arange(0, BLOCK_P)
    others = (peers < P) & (peers != RANK)
    theirs = tl.load(flags_ptr + peers, mask=others, other=0).to(tl.pointer_type(tl.int32)) + RANK * rows + row
    tl.atomic_xchg(theirs, 1, mask=others, sem="release", scope="sys")
    mine = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + peers * rows + row
    here = 0
    while here < P - 1:
        here = tl.sum(tl.where(others, tl.atomic_add(mine, 0, mask=others, sem="acquire", scope="sys"), 0), 0)
    tl.store(mine, 0, mask=others)


@triton.jit
def _all_reduce(
    part_ptr, parts_ptr, flags_ptr, x_ptr, norm_weight_ptr, normed_ptr, rows, first,
    H: tl.constexpr, EPS: tl.constexpr, RANK: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr, ACCUMULATE: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,). part_ptr: for its type alone."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + h, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.zeros([BLOCK_H], tl.float32)
    if ACCUMULATE:
        x = tl.load(x_ptr + row * H + h, mask=inside, other=0.0)
    tell_and_wait(flags_ptr, row, rows, RANK, P, BLOCK_P)
    total = tl.zeros([BLOCK_H], tl.float32)
    for peer in tl.static_range(P):
        theirs = tl.multiple_of(tl.load(parts_ptr + peer).to(part_ptr.dtype), 16)
        total += tl.load(theirs + (first + row) * H + h, mask=inside, other=0.0, volatile=True).to(tl.float32)
    x += total
    tl.store(x_ptr + row * H + h, x, mask=inside)
    if NORM:
        normed = x * tl.rsqrt(tl.sum(x * x, 0) / H + EPS) * norm_weight
        tl.store(normed_ptr + row * H + h, normed.to(normed_ptr.dtype.element_ty), mask=inside)


def all_reduce(
    peers: PeerRows, x: Tensor, *, accumulate: bool, norm: NormAfter | None = None, first: int = 0, pdl: bool = False
) -> None:
    """x fp32 [T, H] = (x if accumulate, +) the sum of the ranks' T rows from `first` on, in their order and in fp32.

    norm: its `out` [T, H] = rms_norm(x), rounded once. All ranks launch this for the same T, which is at most their
    rows; it ends only when they all have. first: each may want other rows, as data ranks do: a reduce-scatter.
    """
    T, H = x.shape
    block, P = triton.next_power_of_2(H), peers.size
    weight, eps, normed = (x, 0.0, x) if norm is None else (norm.weight, norm.eps, norm.out)
    _all_reduce[(T,)](
        peers.part, peers.parts, peers.flags, x, weight, normed, len(peers.part), first,
        H=H, EPS=eps, RANK=peers.rank, P=P, BLOCK_P=triton.next_power_of_2(P), BLOCK_H=block, ACCUMULATE=accumulate,
        NORM=norm is not None, PDL=pdl, num_warps=max(1, min(16, block // 256)), launch_pdl=pdl,
    )  # fmt: skip
