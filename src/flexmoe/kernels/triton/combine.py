"""Add what the K experts of a token made of it, to its row of the residual stream or as a row of its own.

Enters: y [T * K, H], one row an assignment and already weighted, and slot ids [T, K]. Leaves: out [T, H]; from
`combine_norm` also the rows normed for the layer that comes next, which saves it a launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CombineTile:
    """block_h: columns a program adds, a power of two."""

    block_h: int
    num_warps: int


def default_tile(T: int, H: int) -> CombineTile:
    """Four columns a thread, 16 bytes of fp32; few rows are cut finer, so that there are programs enough."""
    block_h = min(256 if T <= 64 else 512, triton.next_power_of_2(H))
    return CombineTile(block_h=block_h, num_warps=max(1, block_h // 128))


@triton.jit
def _combine(
    y_ptr,
    ids_ptr,
    out_ptr,
    H,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    out = out_ptr + row * H + columns
    before = tl.zeros([BLOCK_H], tl.float32)
    if ACCUMULATE:
        before = tl.load(out, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        here = inside & (tl.load(ids_ptr + row * K + k) >= 0)
        total += tl.load(y_ptr + (row * K + k) * H + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(out, (before + total).to(out_ptr.dtype.element_ty), mask=inside)


def combine(
    y: Tensor,
    topk_ids: Tensor,
    out: Tensor,
    *,
    accumulate: bool,
    tile: CombineTile | None = None,
    pdl: bool = False,
) -> None:
    """out [T, H] = (out if accumulate, +) the sum over k, in order and in fp32, of y [T * K, H]; all contiguous.

    An assignment whose id in topk_ids [T, K] is negative adds nothing, and its row of y is not read.
    """
    (T, K), H = topk_ids.shape, out.shape[1]
    tile = tile or default_tile(T, H)
    _combine[(T, triton.cdiv(H, tile.block_h))](
        y,
        topk_ids,
        out,
        H,
        K=K,
        BLOCK_H=tile.block_h,
        ACCUMULATE=accumulate,
        PDL=pdl,
        num_warps=tile.num_warps,
        launch_pdl=pdl,
    )


@triton.jit
def _combine_norm(
    y_ptr, ids_ptr, x_ptr, norm_weight_ptr, normed_ptr,
    H: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    h = tl.arange(0, BLOCK_H)
    norm_weight = tl.load(norm_weight_ptr + h, mask=h < H, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * H + h, mask=h < H, other=0.0)
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        here = h < H
        if ids_ptr is not None:
            here = here & (tl.load(ids_ptr + row * K + k) >= 0)
        total += tl.load(y_ptr + (row * K + k) * H + h, mask=here, other=0.0).to(tl.float32)
    x += total
    tl.store(x_ptr + row * H + h, x, mask=h < H)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / H + EPS) * norm_weight
    tl.store(normed_ptr + row * H + h, normed.to(normed_ptr.dtype.element_ty), mask=h < H)


def combine_norm(
    y: Tensor, topk_ids: Tensor | None, x: Tensor, norm_weight: Tensor, eps: float, normed: Tensor, *, pdl: bool = False
) -> None:
    """x fp32 [T, H] += the sum over k of y [T * K, H], as `combine`; normed [T, H] = rms_norm(x), rounded once.

    topk_ids: None where every row of y counts.
    """
    T, H = x.shape
    K = len(y) // T
    block = triton.next_power_of_2(H)
    _combine_norm[(T,)](
        y, topk_ids, x, norm_weight, normed,
        H=H, K=K, EPS=eps, BLOCK_H=block, PDL=pdl, num_warps=max(1, min(16, block // 256)), launch_pdl=pdl,
    )  # fmt: skip
