"""Ask the L2 cache for memory that no earlier kernel writes, while a kernel still waits for the one before it.

Enters: addresses. Leaves: nothing that a program waits for. For kernels launched with PDL only, whose programs stand
ready long before they may read: memory is then busy with weights and keys while a chain of short kernels runs. It is
Hopper's instruction; PDL is not used on older GPUs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BULK = tl.constexpr("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;")
_LINE = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
LINE_BYTES = tl.constexpr(128)
_LEAST = 64  # columns of a request
_REQUEST_BYTES = 4096  # of `prefetch_share`


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a later kernel will read first: of each of `pieces` equal parts of a weight the first `columns` numbers.

    A kernel that waits for others while memory is idle may ask for it; how much is best is a question of the cache.
    """

    weight: Tensor
    pieces: int
    columns: int

    @classmethod
    def of(cls, weight: Tensor, pieces: int, max_bytes: int) -> Ahead | None:
        """At most `max_bytes` of a contiguous weight; None if that is not one request a piece."""
        request = _REQUEST_BYTES // weight.element_size()
        columns = min(weight.numel() // pieces, max_bytes // weight.element_size() // pieces) // request * request
        aligned = weight.numel() // pieces * weight.element_size() % 16 == 0
        return cls(weight, pieces, columns) if columns and aligned else None


def ahead_arguments(ahead: Ahead | None, *, pdl: bool) -> dict[str, Any]:
    """Of a kernel that calls `prefetch_share`; it asks for nothing without PDL, which tells a GPU that can."""
    if ahead is None or not pdl:
        return {"ahead_ptr": None, "PIECES": 0, "STRIDE": 0, "EACH": 1, "REQUEST": 0}
    request = _REQUEST_BYTES // ahead.weight.element_size()
    stride = ahead.weight.numel() // ahead.pieces
    shape = {"PIECES": ahead.pieces, "STRIDE": stride, "EACH": ahead.columns // request, "REQUEST": request}
    return {"ahead_ptr": ahead.weight} | shape


def columns_to_prefetch(wanted: int, columns: int, weight: Tensor) -> int:
    """At most those there are, halved until they fit; none where rows do not begin on 16 bytes."""
    while wanted > max(columns, 0):
        wanted //= 2
    row_bytes = weight.shape[-1] * weight.element_size()
    return wanted if wanted >= _LEAST and row_bytes % 16 == 0 else 0


@triton.jit
def prefetch_rows(
    w_ptr, row, column, N, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr
):
    """Ask L2 for COLUMNS columns of ROWS rows of a weight [N, K].

    The 32 threads of a warp ask for the same, which is one request; different ones would be made one after the other.
    """
    PARTS: tl.constexpr = max(1, min(WARPS // ROWS, COLUMNS // 64))
    WIDTH: tl.constexpr = COLUMNS // PARTS
    job = tl.arange(0, 32 * ROWS * PARTS) // 32
    rows = tl.minimum(row + job % ROWS, N - 1).to(tl.int64)
    columns = tl.minimum(column + job // ROWS * WIDTH, K - WIDTH)
    size = WIDTH * (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    at = w_ptr + rows * K + columns
    tl.inline_asm_elementwise(_BULK, "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_lines(at):
    """Ask L2 for the cache line of each address: pieces too short and too scattered for `prefetch_rows`."""
    tl.inline_asm_elementwise(_LINE, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_share(
    w_ptr, index, programs, PIECES: tl.constexpr, STRIDE: tl.constexpr, EACH: tl.constexpr, REQUEST: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Ask L2 for what an `Ahead` names; all `programs` share it, this is number `index`. PIECES of 0: for nothing."""
    TOTAL: tl.constexpr = PIECES * EACH
    if TOTAL > 0:
        warp = tl.arange(0, 32 * WARPS) // 32
        for first in tl.range(index, TOTAL, programs * WARPS):
            request = tl.minimum(first + warp * programs, TOTAL - 1)
            at = w_ptr + (request // EACH).to(tl.int64) * STRIDE + request % EACH * REQUEST
            size = warp * 0 + REQUEST * (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
            tl.inline_asm_elementwise(_BULK, "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1)
