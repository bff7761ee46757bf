"""Norm of a row and its product with the router, in one launch for few rows and in two for many.

Enters: rows of the residual stream, fp32 [T, H]. Leaves: the normalised rows, which the experts read, and the logits.

Few rows: a program takes one row and some experts, holds the whole of both in registers (the router's weights before
it waits for the row) and normalises the row for itself. Many rows: one launch normalises, one multiplies in tiles on
tensor cores. Their sums differ in order, so logits may differ in the last bits between the two.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RouteTile:
    """block_t: rows a program multiplies; 1: the way of few rows. block_e: experts a program; block_k: columns a step.

    block_k, num_stages: for many rows only. All powers of two; block_t and block_e at least 16 for many rows.
    """

    block_t: int
    block_e: int
    block_k: int
    num_warps: int
    num_stages: int


_FEW_ROWS = 8
_CHEAP_READS = 8 << 20  # bytes of router weights that may be read again, from the L2 cache, to save a launch
_PROGRAMS = 132  # enough to fill the card
_HELD = 8192  # router weights of 16 bits a program holds in registers; fp32 ones are taken an expert at a time


def default_tile(T: int, H: int, E: int, itemsize: int) -> RouteTile:
    """itemsize: bytes of one router weight."""
    if T <= _FEW_ROWS or T * E * H * itemsize <= _CHEAP_READS:
        width = triton.next_power_of_2(H)
        block_e = 1
        while itemsize < 4 and block_e * 2 * width <= _HELD and block_e * 2 * _PROGRAMS <= T * E:
            block_e *= 2
        return RouteTile(block_t=1, block_e=block_e, block_k=0, num_warps=min(8, max(1, width // 512)), num_stages=1)
    return many_rows_tile(T, E, itemsize)


def many_rows_tile(T: int, E: int, itemsize: int) -> RouteTile:
    """Of the way of many rows, which takes them normed."""
    exact = itemsize == 4  # several products a step: shorter steps, or registers run out
    side = 16 if T <= 128 else 32 if T <= 256 else _side(T, E)
    block_e = min(side, _at_least_16(E))
    if side == 64:
        return RouteTile(block_t=64, block_e=block_e, block_k=32 if exact else 64, num_warps=4, num_stages=3)
    k, warps = 32 if exact else 128, 2 if side == 16 else 4
    return RouteTile(block_t=side, block_e=block_e, block_k=k, num_warps=warps, num_stages=4)


def _side(T: int, E: int) -> int:
    """The largest block of rows with which programs fill the card."""
    sides = (64, 32)
    filling = (s for s in sides if triton.cdiv(T, s) * triton.cdiv(E, min(s, _at_least_16(E))) >= _PROGRAMS)
    return next(filling, 16)


def _at_least_16(number: int) -> int:
    return max(16, int(triton.next_power_of_2(number)))


@triton.jit
def _norm(x, weight, eps, H):
    """x fp32 [1, BLOCK_H] -> in weight's dtype, rounded once."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / H + eps)
    return (x * scale[:, None] * weight.to(tl.float32)).to(weight.dtype)


@triton.jit
def _route_few(
    x_ptr,
    norm_weight_ptr,
    eps,
    weight_ptr,
    normed_ptr,
    logits_ptr,
    H,
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORMED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row and BLOCK_E experts; with BLOCK_E = 0 the norm alone, with NORMED the product alone."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if not NORMED:
        norm_weight = tl.load(norm_weight_ptr + h, mask=h < H, other=0.0)
    if BLOCK_E:
        e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        weight = tl.load(weight_ptr + e[:, None] * H + h, mask=(e[:, None] < E) & (h < H), other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if NORMED:
        normed = tl.load(normed_ptr + row * H + h, mask=h < H, other=0.0)  # [1, BLOCK_H]
    else:
        x = tl.load(x_ptr + row * H + h, mask=h < H, other=0.0)
        normed = _norm(x, norm_weight, eps, H)
        if tile == 0:
            tl.store(normed_ptr + row * H + h, normed, mask=h < H)
    if BLOCK_E:
        logits = tl.sum(weight.to(tl.float32) * normed.to(tl.float32), 1)
        tl.store(logits_ptr + row * E + e, logits, mask=e < E)


@triton.jit
def _route_many(
    normed_ptr,
    weight_ptr,
    logits_ptr,
    T,
    H,
    E,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    row_ptr = normed_ptr + t.to(tl.int64)[:, None] * H  # of some hundred thousand rows 2^31 numbers are not enough
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = tl.load(row_ptr + k[None, :], mask=(t[:, None] < T) & (k[None, :] < H), other=0.0)
        weight = tl.load(weight_ptr + e[None, :] * H + k[:, None], mask=(e[None, :] < E) & (k[:, None] < H), other=0.0)
        if WIDEN:
            rows, weight = rows.to(tl.float32), weight.to(tl.float32)
        # Tensor cores cut off what they add to, thousands of times a sum. So each step starts from zero; the limit
        # on imprecise sums, which has no other effect, keeps the compiler from joining the two additions again.
        total += tl.dot(rows, weight, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_K)
    tl.store(logits_ptr + t[:, None] * E + e[None, :], total, mask=(t[:, None] < T) & (e[None, :] < E))


def _precision(rows: torch.dtype, weight: torch.dtype) -> str:
    """How fp32 operands are multiplied so that nothing is lost.

    tf32 holds any bf16 or fp16 number, and an fp32 weight in two parts but for its last bit or two. With fp32 rows as
    well tensor cores are left aside: such models are small, and compared in fp32.
    """
    if rows is torch.float32:
        return "ieee"
    return "tf32x3" if weight is torch.float32 else "tf32"


def route(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    router_weight: Tensor,
    normed: Tensor,
    logits: Tensor,
    *,
    is_normed: bool = False,
    tile: RouteTile | None = None,
    pdl: bool = False,
) -> None:
    """x fp32 [T, H] -> normed [T, H] in the dtype of norm_weight [H], and logits fp32 [T, E]; all contiguous.

    router_weight [E, H]: fp32, or bf16 or fp16 where that holds every value; sums are fp32. H at most 8192: a row is
    held in registers. is_normed: `normed` is there already; of x only the shape counts then.
    """
    (T, H), E = x.shape, router_weight.shape[0]
    tile = tile or default_tile(T, H, E, router_weight.itemsize)
    few = not norms_first(tile)
    if few or not is_normed:
        _norm_and_few(x, norm_weight, eps, router_weight, normed, logits, tile, is_normed=is_normed, pdl=pdl)
    if few:
        return
    _route_many[(triton.cdiv(E, tile.block_e), triton.cdiv(T, tile.block_t))](
        normed,
        router_weight,
        logits,
        T,
        H,
        E,
        BLOCK_T=tile.block_t,
        BLOCK_E=tile.block_e,
        BLOCK_K=tile.block_k,
        WIDEN=normed.dtype != router_weight.dtype,
        PRECISION=_precision(normed.dtype, router_weight.dtype),
        PDL=pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=pdl,
    )


def norms_first(tile: RouteTile) -> bool:
    """Whether a launch of its own norms the rows, which may have been done before."""
    return tile.block_t > 1


def _norm_and_few(
    x: Tensor, norm_weight: Tensor, eps: float, router_weight: Tensor, normed: Tensor, logits: Tensor, tile: RouteTile,
    *, is_normed: bool, pdl: bool,
) -> None:  # fmt: skip
    """The launch for few rows; for a tile of many the norm alone."""
    (T, H), E = x.shape, router_weight.shape[0]
    block_h, few = triton.next_power_of_2(H), not norms_first(tile)
    _route_few[(triton.cdiv(E, tile.block_e) if few else 1, T)](
        x, norm_weight, eps, router_weight, normed, logits, H, E,
        BLOCK_E=tile.block_e if few else 0, BLOCK_H=block_h, NORMED=is_normed, PDL=pdl,
        num_warps=tile.num_warps if few else min(8, max(1, block_h // 512)), launch_pdl=pdl,
    )  # fmt: skip
