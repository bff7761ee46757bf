"""Root-mean-square norm (Zhang and Sennrich, 2019) of rows.

Enters: x [T, H], the fp32 residual stream or rows in the model's dtype. Leaves: [T, H] in the model's dtype.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RMSNormTile:
    """num_warps: of the one program that takes a whole row."""

    num_warps: int = 8


def default_tile(hidden: int) -> RMSNormTile:
    """At most sixteen columns a thread: all of a row is in flight at once."""
    return RMSNormTile(num_warps=max(1, min(16, triton.next_power_of_2(hidden) // 512)))


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, x_stride, out_stride,
    H: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, ROUND_TWICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    h = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + h, mask=h < H, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / H + EPS)
    if ROUND_TWICE:
        x = x.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * out_stride + h, (x * weight).to(out_ptr.dtype.element_ty), mask=h < H)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, *, tile: RMSNormTile | None = None, pdl: bool = False
) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    x: [T, H], fp32 or out's dtype. weight: [H]. out: [T, H]; it may be x. The mean is taken in fp32. Where x has out's
    dtype the normed row is rounded to it before the product with the weight, as Hugging Face does; where x is wider it
    stays in fp32 until the end and is rounded once.
    """
    rows, hidden = x.shape
    tile = tile or default_tile(hidden)
    _rms_norm[(rows,)](
        x, weight, out, x.stride(0), out.stride(0),
        H=hidden, EPS=eps, BLOCK=triton.next_power_of_2(hidden), ROUND_TWICE=x.dtype == out.dtype, PDL=pdl,
        num_warps=tile.num_warps, launch_pdl=pdl,
    )  # fmt: skip
