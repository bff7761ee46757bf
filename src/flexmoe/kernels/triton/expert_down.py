"""The second half of an expert, its down projection, and the routing weights.

Enters: hidden [T*K, F], one row for each assignment a = t*K + k, and expert weights down [S, H, F]. Leaves: the
weighted sum of each token's K experts, added to the residual stream or by itself, or one weighted row for each
assignment.

`expert_down_gemv`, for a few rows: a program owns some columns of one token's output and all of its K experts. Warps
share the experts out among them and add up in one fixed order at the end: no atomics.
`expert_down_grouped`, for many rows: on the tensor cores; `combine` adds up the K rows of each token afterwards.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flexmoe.kernels.gpu import stages_that_fit
from flexmoe.kernels.triton.expert_blocks import (
    block_rows,
    dot_rows,
    grid_blocks,
    has_tail,
    own_block,
    tail_of,
)
from flexmoe.kernels.triton.topk import select_experts


@dataclass(frozen=True, slots=True)
class DownGemvTile:
    """Tile of the kernel for few rows. All numbers are powers of two.

    outputs: columns of H that a program owns. columns: how many of F it has in flight at once for each of them and
    each expert. num_warps: K of them, or a multiple, go best with several outputs. num_stages: above 1, tiles on their
    way wait in shared memory, up to num_stages - 1 of them; at 1 they go straight to registers.
    early_ids: with PDL, choose the experts from the router's logits and ask for the first weights before the gate/up
    kernel has finished. Only legal behind one launched with `late_trigger`, and with logits that no kernel but the
    router wrote: else the router may still be at work.
    """

    outputs: int = 2
    columns: int = 1024
    num_warps: int = 8
    num_stages: int = 1
    early_ids: bool = False


@triton.jit
def _early_ids(logits_ptr, k, alive, E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr):
    """For each k the expert of the row at logits_ptr, as the gate/up kernel chooses; -1 past K and if not alive."""
    experts, _ = select_experts(logits_ptr, E, BLOCK_E, K, False)
    ids = tl.where(k < K, 0, -1)
    for i in tl.static_range(K):
        ids = tl.where(k == i, experts[i], ids)
    return tl.where(alive, ids, -1)


@triton.jit
def _down_gemv(
    hidden_ptr, ids_ptr, weights_ptr, down_ptr, out_ptr, logits_ptr, lengths_ptr,
    H: tl.constexpr, F: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, OUTPUTS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
    STAGES: tl.constexpr, EARLY_IDS: tl.constexpr, HAS_LENGTHS: tl.constexpr, ACCUMULATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # size: a kernel's prologue, loads and loop share their registers
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    BLOCK_F: tl.constexpr = SPLIT * CHUNKS * LANES
    # [BLOCK_K, SPLIT, OUTPUTS, CHUNKS, LANES]: the compiler spreads threads over the last dimension, warps over the
    # first two, and keeps the others in each thread.
    chunk = tl.arange(0, SPLIT)[:, None] * CHUNKS + tl.arange(0, CHUNKS)[None, :]
    column = (chunk[:, :, None] * LANES + tl.arange(0, LANES)[None, None, :])[None, :, None, :, :]
    if PDL and not EARLY_IDS:
        tl.extra.cuda.gdc_wait()
    if EARLY_IDS:
        alive = tl.load(lengths_ptr + t) > 0 if HAS_LENGTHS else True
        ids = _early_ids(logits_ptr + t * E, k, alive, E, BLOCK_E, K)
    else:
        ids = tl.load(ids_ptr + t * K + k, mask=k < K, other=-1)
    chosen = (ids >= 0)[:, None, None, None, None]
    down_ptr += tl.maximum(ids, 0).to(tl.int64)[:, None, None, None, None] * (H * F) + n[None, None, :, None, None] * F
    hidden_ptr += (t * K + k)[:, None, None, None, None] * F
    here = chosen & (n < H)[None, None, :, None, None] if H % OUTPUTS else chosen
    if EARLY_IDS or BLOCK_F >= F:
        weights = tl.load(down_ptr + column, mask=here & (column < F), other=0.0, eviction_policy="evict_first")
        if PDL and EARLY_IDS:
            tl.extra.cuda.gdc_wait()
    before = tl.load(out_ptr + t * H + n, mask=n < H, other=0.0) if ACCUMULATE else tl.zeros([OUTPUTS], tl.float32)
    scale = tl.load(weights_ptr + t * K + k, mask=ids >= 0, other=0.0)
    if EARLY_IDS or BLOCK_F >= F:
        hidden = tl.load(hidden_ptr + column, mask=chosen & (column < F), other=0.0)
        total = tl.sum(weights.to(tl.float32) * hidden.to(tl.float32), 3)
    else:
        total = tl.zeros([BLOCK_K, SPLIT, OUTPUTS, LANES], tl.float32)
    for start in tl.range(BLOCK_F if EARLY_IDS or BLOCK_F >= F else 0, F, BLOCK_F, num_stages=STAGES):
        at = start + column
        if F % BLOCK_F:
            weights = tl.load(down_ptr + at, mask=here & (at < F), other=0.0, eviction_policy="evict_first")
            hidden = tl.load(hidden_ptr + at, mask=chosen & (at < F), other=0.0)
        else:
            weights = tl.load(down_ptr + at, mask=here, other=0.0, eviction_policy="evict_first")
            hidden = tl.load(hidden_ptr + at, mask=chosen, other=0.0)
        total += tl.sum(weights.to(tl.float32) * hidden.to(tl.float32), 3)
    each = tl.sum(tl.sum(total, 3), 1) * scale[:, None]  # [BLOCK_K, OUTPUTS]
    tl.store(out_ptr + t * H + n, (before + tl.sum(each, 0)).to(out_ptr.dtype.element_ty), mask=n < H)


def expert_down_gemv(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    down: Tensor,
    out: Tensor,
    *,
    logits: Tensor | None = None,
    lengths: Tensor | None = None,
    accumulate: bool = True,
    tile: DownGemvTile | None = None,
    pdl: bool = False,
) -> None:
    """out [T, H] fp32 += for each token the sum over k of topk_weights * (down[topk_ids] @ hidden row t*K + k).

    accumulate: else out, of any dtype, is that sum alone.

    hidden [T*K, F] and down [S, H, F] of one dtype, topk_ids int32 and topk_weights fp32 [T, K]; ids of -1 add nothing.
    logits fp32 [T, S] and lengths int32 [T]: only for the tile's `early_ids`, the same as for the gate/up kernel. Any H
    and F, F best a multiple of 16 bytes.
    """
    (T, K), (S, H, F) = topk_ids.shape, down.shape
    tile = tile or default_gemv_tile(K, F, down.dtype)
    if tile.early_ids and logits is None:
        raise ValueError("early_ids chooses experts from the router's logits; give them.")
    lanes = 512 // down.itemsize
    block_k = triton.next_power_of_2(K)
    split = max(1, tile.num_warps // block_k)
    _down_gemv[(T, triton.cdiv(H, tile.outputs))](
        hidden, topk_ids, topk_weights, down, out, logits, lengths,
        H=H, F=F, E=S, BLOCK_E=triton.next_power_of_2(S), K=K, BLOCK_K=block_k,
        SPLIT=split, OUTPUTS=tile.outputs, CHUNKS=max(1, tile.columns // (split * lanes)), LANES=lanes,
        STAGES=tile.num_stages, EARLY_IDS=tile.early_ids, HAS_LENGTHS=lengths is not None,
        ACCUMULATE=accumulate, PDL=pdl, num_warps=tile.num_warps, launch_pdl=pdl,
    )  # fmt: skip


def default_gemv_tile(top_k: int, width: int, dtype: torch.dtype) -> DownGemvTile:
    """Two columns of H by eight warps, that divide the experts; 1 to 4 KiB of each expert's row in flight."""
    columns = triton.next_power_of_2(width)
    if columns * dtype.itemsize > 1024 and columns == width and top_k >= 8:
        columns = max(512 // (dtype.itemsize // 2 or 1), columns // 2)
    return DownGemvTile(2, min(columns, 4096 // dtype.itemsize), 8)


_MANY_PROGRAMS = 400  # three for each processor of an H200


@dataclass(frozen=True, slots=True)
class DownTile:
    """Tile of the kernel for many rows; blocks are powers of two, at least 16.

    block_m: rows of one expert. block_n: of H. block_k: of F, loaded at once. swap, tma, group, tail: as in GateUpTile.
    """

    block_m: int = 16
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 5
    swap: bool = True
    tma: bool = False
    group: int = 0
    tail: int = 0


@triton.jit
def _store_y(y_ptr, a, scale, i, count, n, y, H: tl.constexpr, SWAP: tl.constexpr):
    """Rows a of y from sums [rows, BLOCK_N], transposed if SWAP, scaled; of rows i those below count."""
    if SWAP:
        y = y.T
    at = y_ptr + a.to(tl.int64)[:, None] * H + n[None, :]
    y *= scale[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(i < count)[:, None] & (n < H)[None, :])


@triton.jit
def _down_block(
    hidden_ptr, rows_ptr, weights_ptr, down_ptr, y_ptr, depth, slot, first, count, column,
    H: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of a slot from `first` on, and TAIL more, of which those below count are valid; rows_ptr: its."""
    i = first + tl.arange(0, BLOCK_M)
    a = tl.load(rows_ptr + i, mask=i < count, other=0)
    scale = tl.load(weights_ptr + a, mask=i < count, other=0.0)
    hidden_at = hidden_ptr + a.to(tl.int64)[:, None] * F
    first_n = column * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    if not TMA:
        down_at = down_ptr + slot.to(tl.int64) * (H * F) + n[:, None] * F
    shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
    y = tl.zeros(shape, tl.float32)
    if TAIL > 0:
        tail_i = first + BLOCK_M + tl.arange(0, TAIL)
        tail_a = tl.load(rows_ptr + tail_i, mask=tail_i < count, other=0)
        tail_scale = tl.load(weights_ptr + tail_a, mask=tail_i < count, other=0.0)
        tail_at = hidden_ptr + tail_a.to(tl.int64)[:, None] * F
        tail_y = tl.zeros((BLOCK_N, TAIL), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        whole: tl.constexpr = F % BLOCK_K == 0
        hidden = tl.load(hidden_at + k, mask=(i < count)[:, None] & (whole | (k < F)), other=0.0)
        if TMA:
            weights = down_ptr.load([slot * H + first_n, start])
        elif whole and H % BLOCK_N == 0:
            weights = tl.load(down_at + k)
        else:
            weights = tl.load(down_at + k, mask=(n < H)[:, None] & (k < F), other=0.0)
        y = dot_rows(hidden, weights, y, SWAP)
        if TAIL > 0:
            tail = tl.load(tail_at + k, mask=(tail_i < count)[:, None] & (whole | (k < F)), other=0.0)
            tail_y = dot_rows(tail, weights, tail_y, True)
    _store_y(y_ptr, a, scale, i, count, n, y, H, SWAP)
    if TAIL > 0:
        _store_y(y_ptr, tail_a, tail_scale, tail_i, count, n, tail_y, H, True)


@triton.jit
def _down_grouped(
    hidden_ptr, rows_ptr, counts_ptr, weights_ptr, down_ptr, y_ptr, capacity, depth,
    H: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, ONE_EACH: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot, rows_ptr, first, count, column = own_block(
        rows_ptr, counts_ptr, capacity, S, BLOCK_M, TAIL, ONE_EACH, GROUP
    )  # fmt: skip
    tailed = has_tail(first, count, BLOCK_M, TAIL) if TAIL > 0 else False
    if tailed:  # a loop of its own, so that a tail costs nothing where there is none
        _down_block(
            hidden_ptr, rows_ptr, weights_ptr, down_ptr, y_ptr, depth, slot, first, count, column, H, F, BLOCK_M, TAIL,
            BLOCK_N, BLOCK_K, STAGES, SWAP, TMA,
        )  # fmt: skip
    elif first < count:
        _down_block(
            hidden_ptr, rows_ptr, weights_ptr, down_ptr, y_ptr, depth, slot, first, count, column, H, F, BLOCK_M, 0,
            BLOCK_N, BLOCK_K, STAGES, SWAP, TMA,
        )  # fmt: skip


def expert_down_grouped(
    hidden: Tensor,
    rows: Tensor,
    counts: Tensor,
    topk_weights: Tensor,
    down: Tensor,
    y: Tensor,
    *,
    tile: DownTile | None = None,
    pdl: bool = False,
) -> None:
    """y [T*K, H], in any dtype: row a = topk_weights[a] * (down[slot of a] @ hidden[a]); on the tensor cores.

    hidden [T*K, F] and down [S, H, F] of one dtype, topk_weights fp32 [T, K]; rows and counts as for the gate/up
    kernel. Assignments of no slot get no row of y. Any H and F, F best a multiple of 16 bytes.
    """
    (T, K), (S, H, F) = topk_weights.shape, down.shape
    tile = tile or default_tile(T, K, S, H, F, down.dtype)
    blocks, one_each = grid_blocks(T, K, S, tile.block_m, tile.tail)
    tma = tile.tma and F * down.itemsize % 16 == 0
    weights = TensorDescriptor.from_tensor(down.view(-1, F), [tile.block_n, tile.block_k]) if tma else down
    _down_grouped[(blocks, triton.cdiv(H, tile.block_n))](
        hidden, rows, counts, topk_weights, weights, y, rows.stride(0), F, H=H, F=F, S=S,
        BLOCK_M=tile.block_m, TAIL=tile.tail, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.num_stages,
        SWAP=tile.swap, TMA=tma, ONE_EACH=one_each, GROUP=tile.group, PDL=pdl, num_warps=tile.num_warps, launch_pdl=pdl,
    )  # fmt: skip


def default_tile(rows: int, top_k: int, num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> DownTile:
    """A tile for `rows` tokens of uniform routing, by how many of them an expert that gets any may expect."""
    del width  # it has been long next to every tile so far
    if dtype is torch.float32:  # no tensor cores for exact fp32
        return DownTile(16 if rows <= 64 else 32, 32, 32, num_stages=3, swap=False)
    block = block_rows(rows, top_k, num_experts)
    if block == 128:
        # Measured on an H200, Mixtral's shape: 577 TFLOP/s at 2,048 tokens (529 without TMA); at 512 a tile half as
        # wide has programs enough, 380 (337).
        wide = (rows * top_k // 128 + num_experts // 2) * hidden >= 256 * _MANY_PROGRAMS
        tail = tail_of(rows, top_k, num_experts, block)
        tile = DownTile(128, 256 if wide else 128, 64, num_warps=8, num_stages=4, swap=False, tma=True, tail=tail)
    elif block == 16:  # measured inside decode steps on an H200: up to 16% less than 64 columns and five stages
        tile = DownTile(block, block_k=128, num_stages=4)
    else:
        tile = DownTile(block, num_stages=5 if block <= 32 else 4)
    stage = (tile.block_m + tile.tail + tile.block_n) * tile.block_k * dtype.itemsize
    return replace(tile, num_stages=stages_that_fit(tile.num_stages, stage))
