"""The rows of all ranks brought to each of them, in one launch: an all-gather without NCCL.

Enters: on each rank its rows, in memory that the other ranks can read. Leaves: a copy of everybody's. A program takes
one row of each rank, with the flags of `all_reduce`. A rank's rows may be written again once a later exchange between
the same ranks, in other memory, is done.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.triton.all_reduce import PeerRows, tell_and_wait


@triton.jit
def _gather_rows(
    part_ptr, parts_ptr, flags_ptr, out_ptr, rows,
    H: tl.constexpr, RANK: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,). part_ptr: for its type alone."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tell_and_wait(flags_ptr, row, rows, RANK, P, BLOCK_P)
    for peer in tl.static_range(P):
        theirs = tl.multiple_of(tl.load(parts_ptr + peer).to(part_ptr.dtype), 16)
        x = tl.load(theirs + row * H + h, mask=inside, other=0, volatile=True)
        tl.store(out_ptr + (peer * tl.num_programs(0) + row) * H + h, x, mask=inside)


def gather_rows(peers: PeerRows, out: Tensor, *, pdl: bool = False) -> None:
    """out [P T, H] = the first T rows of every rank, in the order of the ranks and in their dtype.

    All ranks launch this for the same T, which is at most their rows; it ends only when they all have.
    """
    P, (rows, H) = peers.size, peers.part.shape
    assert out.dtype is peers.part.dtype
    block = triton.next_power_of_2(H)
    _gather_rows[(len(out) // P,)](
        peers.part, peers.parts, peers.flags, out, rows,
        H=H, RANK=peers.rank, P=P, BLOCK_P=triton.next_power_of_2(P), BLOCK_H=block, PDL=pdl,
        num_warps=max(1, min(16, block // 256)), launch_pdl=pdl,
    )  # fmt: skip
