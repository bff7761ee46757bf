"""Read memory once and keep almost nothing: what every kernel bound by memory is measured against.

Enters: x, fp32. Leaves: partial sums, one a program, so that no load can be left out.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StreamReadTile:
    """block: elements that a program has in flight at once."""

    block: int = 8192
    num_warps: int = 8


@triton.jit
def _stream_read(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(program * BLOCK, N, step):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < N, other=0.0, eviction_policy="evict_first")
    tl.store(out_ptr + program, tl.sum(total))


def stream_read(x: Tensor, out: Tensor, *, tile: StreamReadTile | None = None) -> None:
    """Sum x [N], fp32, into out [programs], fp32: as many programs as out has elements share the reading."""
    tile = tile or StreamReadTile()
    _stream_read[(out.numel(),)](x, out, x.numel(), BLOCK=tile.block, num_warps=tile.num_warps)
