"""RMS norm, linear map, bias, residual: the dense projections of a decode step, bound by the memory the weight is in.

Enters: rows x [T, K], the fp32 residual stream or rows in the model's dtype, and a weight [N, K]. Leaves: [T, N].

Three ways, told apart by their tiles. GEMV: 1 to 8 rows, multiply-adds in fp32. Direct: 1 to 32 rows, weights from
memory straight into the registers of the tensor cores. Dot: more rows, through shared memory. All read the weight once
(Dot: once a block of rows). A row's result does not depend on what the other rows hold; across tiles it may differ by
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from flexmoe.config.engine import MAX_ROWS
from flexmoe.kernels.gpu import stages_that_fit
from flexmoe.kernels.triton.norm_linear_kernels import _direct, _dot, _gemv, _reduce, _reduce_norm
from flexmoe.kernels.triton.rms_norm import rms_norm

_ALIGNMENT = 256  # bytes, of each part of the scratch memory


@dataclass(frozen=True, slots=True)
class GemvTile:
    """Up to 8 rows. A program takes lanes * warps_n * rows rows of the weight. Powers of two, but ahead and x_ahead.

    lanes: rows of the weight side by side in a warp, whose threads divide the columns, 32 / lanes to a row. warps_n,
    warps_k: warps along the rows, and along the columns. rows: of the weight a thread. ahead: blocks of columns (16
    bytes a thread and row) that are loaded before anything else, x_ahead: those of x; both are cut to what there is.
    prefetch: further columns to ask L2 for while waiting for the kernel before, at least 64, or 0; only with PDL.
    """

    lanes: int = 4
    warps_n: int = 1
    warps_k: int = 8
    rows: int = 2
    ahead: int = 8
    x_ahead: int = 4
    prefetch: int = 0


@dataclass(frozen=True, slots=True)
class DirectTile:
    """Up to 32 rows of two-byte numbers. A program takes 16 * warps_n * rows rows of the weight.

    As `GemvTile`; a block is 32 * warps_k columns, of which a thread holds 32 bytes for each of `rows`. chains: sums
    that the products of a warp take turns in. fuse_norm: norm here, else in a launch of its own before; never for fp16,
    whose range the rows before the norm may exceed.
    """

    warps_n: int = 1
    warps_k: int = 8
    rows: int = 1
    ahead: int = 8
    x_ahead: int = 8
    chains: int = 2
    prefetch: int = 0
    fuse_norm: bool = True


@dataclass(frozen=True, slots=True)
class DotTile:
    """Up to 512 rows. splits: parts of K, each in programs of its own, added up by a second kernel in their order.

    prefetch: columns of each split to ask L2 for while waiting for the kernel before, as in `GemvTile`.
    """

    block_t: int = 64
    block_n: int = 64
    block_k: int = 128
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 0


Tile = GemvTile | DirectTile | DotTile


@dataclass(frozen=True, slots=True)
class NormAfter:
    """The norm of the rows that come out: weight [N], and where it goes, [T, N]; see `norms_after`."""

    weight: Tensor
    eps: float
    out: Tensor


def norms_after(tile: Tile) -> bool:
    """Whether a launch that there is anyway can do a `NormAfter`: the one that adds up splits."""
    return isinstance(tile, DotTile) and tile.splits > 1


def default_tile(rows: int, n: int, k: int, dtype: torch.dtype, sm_count: int = 132) -> Tile:
    """For x [rows, k] and a weight [n, k] of `dtype`: whole waves of programs, enough bytes in flight."""
    wide = dtype is torch.float32
    if rows <= 8 and wide:
        return GemvTile(warps_k=8 if k >= 2048 else 4, rows=1 if n <= 16 * sm_count else 2, ahead=4, x_ahead=2)
    if rows <= 16 and not wide:
        return _direct_tile(rows, n, k, sm_count)
    block_t = min(32 if wide else 128, max(16, triton.next_power_of_2(rows)))
    small = n * k < 4096 * 4096 and n <= 64 * sm_count  # a wave or two: then more, narrower programs pay
    block_n = 32 if wide or (small and (block_t == 128 or n >= 32 * sm_count)) else 64
    splits, programs = 1, triton.cdiv(n, block_n) * triton.cdiv(rows, block_t)
    while splits < 8 and programs * splits <= (sm_count - 10 if small else sm_count) and k // (splits * 2) >= 512:
        splits *= 2
    if wide:
        return DotTile(block_t, block_n, 32, splits, num_stages=2)
    if small:
        tile = DotTile(block_t, block_n, 128, splits)
    else:
        tile = DotTile(block_t, block_n, 128 if block_t <= 32 else 64, splits, num_warps=8 if block_t == 128 else 4)
    stage = (tile.block_t + tile.block_n) * tile.block_k * dtype.itemsize
    return replace(tile, num_stages=stages_that_fit(tile.num_stages, stage))


def _direct_tile(rows: int, n: int, k: int, sm_count: int) -> DirectTile:
    """Few rows of the weight: all is in registers or L2 before the wait. Many: small programs, several an SM.

    The norm is a launch of its own: measured inside decode steps on an H200, fused into each program it costs a QKV
    projection of one row 1.6 us (Qwen3-30B) to 7 us (Mixtral) more.
    """
    if n <= 16 * sm_count:
        warps_k = 16 if k >= 4096 and rows > 4 else 8 if k >= 2048 else 4
        return DirectTile(warps_k=warps_k, x_ahead=8 if 4 < rows <= 8 else 4, fuse_norm=False)
    if n > 64 * sm_count:
        return DirectTile(
            warps_k=4, rows=1 if rows <= 8 else 2, ahead=8 if rows <= 8 else 4, x_ahead=2, fuse_norm=False
        )
    if rows <= 4:
        return DirectTile(warps_k=4, x_ahead=4, fuse_norm=False)
    if k >= 4096:
        return DirectTile(warps_k=8, x_ahead=4, fuse_norm=False)
    return DirectTile(warps_n=2, warps_k=4, x_ahead=4, prefetch=2048, fuse_norm=False)


def scratch_bytes(rows: int, n: int, k: int, dtype: torch.dtype, *, norm: bool, tile: Tile | None = None) -> int:
    """Bytes of scratch memory that `norm_linear` needs for x [rows, k] and a weight [n, k] of `dtype`; often none."""
    tile = tile or default_tile(rows, n, k, dtype)
    normed = _aligned(rows * k * dtype.itemsize) if norm and not _fuses_norm(tile, dtype) else 0
    partial = tile.splits * rows * n * 4 if isinstance(tile, DotTile) and tile.splits > 1 else 0
    return normed + partial


def norm_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: bool = False,
    after: NormAfter | None = None,
    scratch: Tensor | None = None,
    tile: Tile | None = None,
    pdl: bool = False,
) -> None:
    """out = rms_norm(x) W^T + bias, or out += that if `residual`.

    x: [T, K], fp32 or the weight's dtype, T <= 512. weight: [N, K], contiguous. out: [T, N], fp32 or the weight's
    dtype; fp32 if `residual`. norm_weight: [K], or None for no norm. bias: [N]. after: only with `residual` and a tile
    that `norms_after`. scratch: uint8, of `scratch_bytes` at
    least; it may be shared by all launches of one stream. Rows are one after the other: x.stride(1) == 1.
    """
    rows, k = x.shape
    n = weight.shape[0]
    assert rows <= MAX_ROWS, f"{rows} rows; at most {MAX_ROWS}"
    assert weight.is_contiguous()
    assert x.stride(1) == out.stride(1) == 1
    assert x.data_ptr() % 4 == 0, "a row must begin on four bytes"
    assert not residual or out.dtype is torch.float32
    tile = tile or default_tile(rows, n, k, weight.dtype)
    partial = None
    if not (norm_weight is None or _fuses_norm(tile, weight.dtype)):
        assert scratch is not None
        size = rows * k * weight.element_size()
        normed = scratch[:size].view(weight.dtype).view(rows, k)
        rms_norm(x, norm_weight, eps, normed, pdl=pdl)
        x, norm_weight, scratch = normed, None, scratch[_aligned(size) :]
    flags: dict[str, Any] = {"BIAS": bias is not None, "RESIDUAL": residual, "PDL": pdl, "launch_pdl": pdl}
    if isinstance(tile, DotTile):
        if tile.splits > 1:
            assert scratch is not None
            partial = scratch[: tile.splits * rows * n * 4].view(torch.float32)
        _launch_dot(x, weight, bias, out, partial, after, tile, flags)
        return
    assert after is None
    flags |= {"NORM": norm_weight is not None, "EPS": eps}
    if isinstance(tile, GemvTile):
        _launch_gemv(x, weight, norm_weight, bias, out, tile, flags)
    else:
        _launch_direct(x, weight, norm_weight, bias, out, tile, flags)


def _fuses_norm(tile: Tile, dtype: torch.dtype) -> bool:
    return isinstance(tile, GemvTile) or (
        isinstance(tile, DirectTile) and tile.fuse_norm and dtype is not torch.float16
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _launch_gemv(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    tile: GemvTile,
    flags: dict[str, Any],
) -> None:
    rows, k = x.shape
    n = weight.shape[0]
    assert rows <= 8
    vector = 16 // weight.element_size()
    grid = (triton.cdiv(n, tile.lanes * tile.warps_n * tile.rows),)
    _gemv[grid](
        x, weight, norm_weight, bias, out, n, x.stride(0), out.stride(0),
        K=k, T=rows, PAD_T=triton.next_power_of_2(rows), VEC=vector, LANES=tile.lanes, ROWS=tile.rows,
        **_streams(tile, k, 32 // tile.lanes * tile.warps_k * vector, weight), **flags,
    )  # fmt: skip


def _launch_direct(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    tile: DirectTile,
    flags: dict[str, Any],
) -> None:
    rows, k = x.shape
    n = weight.shape[0]
    assert rows <= 32
    grid = (triton.cdiv(n, 16 * tile.warps_n * tile.rows),)
    _direct[grid](
        x, weight, norm_weight, bias, out, rows, n, x.stride(0), out.stride(0),
        K=k, TOKENS=triton.next_power_of_2(triton.cdiv(rows, 8)), ROWS=tile.rows, CHAINS=tile.chains,
        **_streams(tile, k, 32 * tile.warps_k, weight), **flags,
    )  # fmt: skip


def _streams(tile: GemvTile | DirectTile, k: int, block_k: int, weight: Tensor) -> dict[str, int]:
    """How the columns are streamed: no further ahead than there are blocks of them."""
    steps = triton.cdiv(k, block_k)
    ahead = min(tile.ahead, steps)
    warps = tile.warps_n * tile.warps_k
    return {
        "WARPS": warps,
        "WARPS_K": tile.warps_k,
        "AHEAD": ahead,
        "X_AHEAD": min(tile.x_ahead, steps),
        "PREFETCH": _prefetched(tile.prefetch, k - ahead * block_k, weight),
        "num_warps": warps,
    }


def _prefetched(wanted: int, columns: int, weight: Tensor) -> int:
    """Columns to prefetch: at most those there are; none where rows do not begin on 16 bytes."""
    while wanted > max(columns, 0):
        wanted //= 2
    return wanted if wanted >= 64 and weight.stride(0) * weight.element_size() % 16 == 0 else 0


def _launch_dot(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, partial: Tensor | None, after: NormAfter | None,
    tile: DotTile, flags: dict[str, Any],
) -> None:  # fmt: skip
    rows, k = x.shape
    n = weight.shape[0]
    grid = (triton.cdiv(rows, tile.block_t), triton.cdiv(n, tile.block_n), tile.splits)
    _dot[grid](
        x, weight, bias, out, partial, rows, n, x.stride(0), out.stride(0),
        K=k, BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, SPLITS=tile.splits,
        STAGES=tile.num_stages, PREFETCH=_prefetched(tile.prefetch, k // tile.splits, weight),
        WARPS=tile.num_warps, num_warps=tile.num_warps, **flags,
    )  # fmt: skip
    if partial is None:
        assert after is None
    elif after is None:
        block = min(1024, triton.next_power_of_2(n))
        _reduce[(triton.cdiv(n, block), rows)](
            partial, bias, out, rows, n, out.stride(0), SPLITS=tile.splits, BLOCK=block, num_warps=4, **flags
        )
    else:
        assert flags.pop("RESIDUAL")
        block = triton.next_power_of_2(n)
        _reduce_norm[(rows,)](
            partial, bias, out, after.weight, after.out, rows, n, out.stride(0), SPLITS=tile.splits, EPS=after.eps,
            BLOCK=block, num_warps=max(1, min(16, block // 256)), **flags,
        )  # fmt: skip
