"""Rows copied to their experts: those of slot 0, then those of slot 1, and so on, side by side.

Enters: rows, and who chose which slot, as `group_by_expert` lists it. Leaves: a row a choice, so that a copy engine can
bring blocks of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 4, 1024  # that a program copies at once


@triton.jit
def _copy_by_expert(
    x_ptr, rows_ptr, counts_ptr, out_ptr, capacity,
    K: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (S, ceil(capacity / ROWS)), of which most end at once."""
    slot, first = tl.program_id(0), tl.program_id(1) * ROWS
    s = tl.arange(0, BLOCK_S)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    count = tl.load(counts_ptr + slot)
    if first < count:
        before = tl.sum(tl.load(counts_ptr + s, mask=s < slot, other=0), 0)
        at = first + tl.arange(0, ROWS)
        choices = tl.load(rows_ptr + slot.to(tl.int64) * capacity + at, mask=at < count, other=0)
        from_row, to_row = (choices // K).to(tl.int64)[:, None] * H, (before + at).to(tl.int64)[:, None] * H
        for start in tl.range(0, H, BLOCK_H):
            h = (start + tl.arange(0, BLOCK_H))[None, :]
            inside = (at < count)[:, None] & (h < H)
            tl.store(out_ptr + to_row + h, tl.load(x_ptr + from_row + h, mask=inside), mask=inside)


def copy_by_expert(x: Tensor, rows: Tensor, counts: Tensor, out: Tensor, *, top_k: int, pdl: bool = False) -> None:
    """x [T, H] -> out [T K, H]: row i of slot s behind all rows of slots before it; all contiguous.

    rows int32 [S, capacity], counts int32 [S]: see `group_by_expert`. What no slot has leaves out's last rows alone.
    """
    S, capacity = rows.shape
    H = x.shape[1]
    _copy_by_expert[(S, triton.cdiv(capacity, _ROWS))](
        x, rows, counts, out, capacity,
        K=top_k, H=H, ROWS=_ROWS, BLOCK_S=triton.next_power_of_2(S),
        BLOCK_H=min(_COLUMNS, triton.next_power_of_2(H)), PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
