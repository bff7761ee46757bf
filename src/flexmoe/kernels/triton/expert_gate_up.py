"""The first half of an expert, hidden = silu(gate) * up, for rows x and the experts that each of them chose.

Enters: x [T, H], expert weights gate_up [S, 2F, H] (gate rows first) and who chose which expert. Leaves: hidden
[T*K, F], one row for each assignment a = t*K + k.

`expert_gate_up_gemv`, for a few rows: one program for some rows of one assignment's expert, which it can pick itself
from the router's logits. No tensor cores: the weights must only arrive, so all that counts is how many bytes are on
their way. Each warp owns whole rows of weights, and so warps never wait for each other.
`expert_gate_up_grouped`, for many rows: rows of one expert meet its weights in tiles on the tensor cores.
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
from flexmoe.kernels.triton.topk import select_expert


@dataclass(frozen=True, slots=True)
class GateUpGemvTile:
    """Tile of the kernel for few rows. All powers of two but `steps`.

    pairs: pairs of rows (gate and up) that a warp has in flight. columns: how many of H at once; where they reach H, x
    stays in registers. steps: tiles that a program computes one after the other. num_stages: above 1, tiles on their
    way wait in shared memory, up to num_stages - 1 of them; at 1 they go straight to registers.
    late_trigger: with PDL, let the next kernel start only once the router has finished. That costs overlap, but is what
    `early_ids` of the down projection needs.
    """

    pairs: int = 1
    columns: int = 2048
    steps: int = 1
    num_warps: int = 4
    num_stages: int = 1
    late_trigger: bool = False


@dataclass(frozen=True, slots=True)
class GateUpTile:
    """Tile of the kernel for many rows; blocks are powers of two, at least 16.

    block_m: rows of one expert. block_n: of F, for gate and up each. block_k: of H, loaded at once. swap: weights stand
    on the left of the product, so that Hopper's large multiplication (64 rows or more) fits however few tokens there
    are; then take block_n from 64 on. tma: weights come through the tensor memory accelerator instead of each thread's
    own copies; where rows of weights are not multiples of 16 bytes this has no effect. group: see `in_groups`.
    tail: 0, 16, 32 or 64: up to so many rows more may join an expert's last block, where they spare it another one.
    They meet the weights that are loaded for the block, always on the left of the product. Eight warps have registers
    for 32 beside a block of 128 by 256 products; 64 spill.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 5
    swap: bool = True
    tma: bool = False
    group: int = 0
    tail: int = 0


@triton.jit
def _dot(weights, x):
    """[WARPS, PAIRS, CHUNKS, LANES] of weights and x -> [WARPS, PAIRS, LANES], summed within each thread."""
    return tl.sum(weights.to(tl.float32) * x.to(tl.float32), 2)


@triton.jit
def _load(at, mask, WHOLE: tl.constexpr):
    """Weights, which are read once: they shall not push anything else out of the caches. WHOLE: no mask is needed."""
    if WHOLE:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_x(at, mask, COPIES: tl.constexpr):
    """x for [COPIES, 1, CHUNKS, LANES]: a copy for each warp spares warps from exchanging one."""
    at = tl.broadcast_to(at, (COPIES, 1, at.shape[2], at.shape[3]))
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _dots_in_chunks(
    x_ptr, gate_ptr, column, inside, H: tl.constexpr, F: tl.constexpr, WARPS: tl.constexpr, PAIRS: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, EVEN_F: tl.constexpr,
):  # fmt: skip
    """Products of x with the rows at gate_ptr and F rows further on, [WARPS, PAIRS, LANES] each, chunk after chunk."""
    gate = tl.zeros([WARPS, PAIRS, LANES], tl.float32)
    up = tl.zeros([WARPS, PAIRS, LANES], tl.float32)
    WHOLE: tl.constexpr = EVEN_F and H % (CHUNKS * LANES) == 0
    for start in tl.range(0, H, CHUNKS * LANES, num_stages=STAGES):
        at = start + column
        mask = inside & (at < H)
        x = _load_x(x_ptr + at, at < H, WARPS if STAGES == 1 else 1)  # in shared memory one serves all warps
        gate += _dot(_load(gate_ptr + at, mask, WHOLE), x)
        up += _dot(_load(gate_ptr + F * H + at, mask, WHOLE), x)
    return gate, up


@triton.jit
def _slot_of(slots_ptr, stride, row, expert, HAS_SLOTS: tl.constexpr):
    """Where a row finds an expert; -1 for none (-1), and for one that is elsewhere. Without slots it is its number."""
    slot = expert
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row * stride + tl.maximum(expert, 0))
        slot = tl.where(expert >= 0, slot, -1)
    return slot


@triton.jit
def _write_choice(logits_ptr, ids_ptr, weights_ptr, slot_ids_ptr, a, alive, expert, slot, HAS_SLOTS: tl.constexpr,
                  E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr):  # fmt: skip
    """Tell the down projection which expert assignment a has, and its weight: more rounds than the expert alone."""
    if HAS_SLOTS:
        tl.store(slot_ids_ptr + a, slot)
    _, weight = select_expert(logits_ptr, E, BLOCK_E, K, a % K, RENORMALIZE)
    tl.store(ids_ptr + a, expert)
    tl.store(weights_ptr + a, tl.where(alive, weight, 0.0))


@triton.jit
def _gate_up_gemv(
    x_ptr, logits_ptr, ids_ptr, weights_ptr, gate_up_ptr, hidden_ptr, lengths_ptr, slots_ptr, slot_ids_ptr, stride,
    H: tl.constexpr, F: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr,
    SELECT: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    WARPS: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, LATE_TRIGGER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # size: a kernel's prologue, loads and loop share their registers
    if PDL and not LATE_TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    a = tl.program_id(0)
    # [WARPS, PAIRS, CHUNKS, LANES]: the compiler spreads threads over the last dimension, warps over the first, and
    # keeps the others in each thread.
    row = (tl.arange(0, WARPS)[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :])[:, :, None, None]
    column = (tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :])[None, None, :, :]
    IN_CHUNKS: tl.constexpr = CHUNKS * LANES < H
    EVEN_F: tl.constexpr = F % (WARPS * PAIRS * STEPS) == 0
    if PDL:
        tl.extra.cuda.gdc_wait()
        if LATE_TRIGGER:
            tl.extra.cuda.gdc_launch_dependents()
    x_ptr += a // K * H
    if not IN_CHUNKS:
        x = _load_x(x_ptr + column, column < H, WARPS)
    alive = True
    if HAS_LENGTHS:
        alive = tl.load(lengths_ptr + a // K) > 0
    if SELECT:
        logits_ptr += a // K * E
        expert, _ = select_expert(logits_ptr, E, BLOCK_E, K, a % K, False)
    else:
        expert = tl.load(ids_ptr + a)
    expert = tl.where(alive, expert, -1)
    slot = _slot_of(slots_ptr, stride, a // K, expert, slots_ptr is not None)
    # Without a slot there are no steps.
    for step in tl.range(0, tl.where(slot >= 0, STEPS, 0), num_stages=1 if IN_CHUNKS else STAGES):
        n = (tl.program_id(1) * STEPS + step) * (WARPS * PAIRS) + row
        gate_ptr = gate_up_ptr + tl.maximum(slot, 0).to(tl.int64) * (2 * F * H) + n * H
        if IN_CHUNKS:
            gate, up = _dots_in_chunks(
                x_ptr, gate_ptr, column, n < F, H, F, WARPS, PAIRS, CHUNKS, LANES, STAGES, EVEN_F
            )
        else:
            mask = (n < F) & (column < H)
            gate = _dot(_load(gate_ptr + column, mask, EVEN_F and CHUNKS * LANES == H), x)
            up = _dot(_load(gate_ptr + F * H + column, mask, EVEN_F and CHUNKS * LANES == H), x)
        gate = tl.sum(gate, 2)  # [WARPS, PAIRS]
        hidden = gate / (1.0 + tl.exp(-gate)) * tl.sum(up, 2)
        at = tl.reshape(n, (WARPS, PAIRS))
        tl.store(hidden_ptr + a * F + at, hidden.to(hidden_ptr.dtype.element_ty), mask=at < F)
    if SELECT and tl.program_id(1) == 0:
        _write_choice(
            logits_ptr, ids_ptr, weights_ptr, slot_ids_ptr, a, alive, expert, slot, slots_ptr is not None, E, BLOCK_E,
            K, RENORMALIZE,
        )  # fmt: skip


def expert_gate_up_gemv(
    x: Tensor,
    logits: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    hidden: Tensor,
    *,
    renormalize: bool = False,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
    slot_ids: Tensor | None = None,
    tile: GateUpGemvTile | None = None,
    pdl: bool = False,
) -> None:
    """x [T, H] and gate_up [S, 2F, H] -> hidden [T*K, F], all of one dtype; for a few rows.

    topk_ids int32 and topk_weights fp32 [T, K]: read if logits is None, else written, chosen by logits fp32 [T, E] with
    the weights of a row summing to 1 if `renormalize`. Assignments with id -1, and rows with length 0 in lengths int32
    [T], get no hidden row; with logits these get id -1 and weight 0. slots, slot_ids: with logits, as for `topk`;
    without them an expert's slot is its number, and E <= S. Any H and F, best multiples of 16 bytes.
    """
    (T, H), K = x.shape, topk_ids.shape[1]
    S, F = gate_up.shape[0], gate_up.shape[1] // 2
    E = S if logits is None else logits.shape[1]
    if E > S and slots is None:
        raise ValueError(f"logits has {E} columns, gate_up {S} experts.")
    tile = tile or default_gemv_tile(H, x.dtype)
    lanes = 512 // x.itemsize
    _gate_up_gemv[(T * K, triton.cdiv(F, tile.num_warps * tile.pairs * tile.steps))](
        x, logits, topk_ids, topk_weights, gate_up, hidden, lengths, slots, slot_ids,
        0 if slots is None else slots.stride(0), H=H, F=F, E=E, BLOCK_E=triton.next_power_of_2(E), K=K,
        SELECT=logits is not None, RENORMALIZE=renormalize, HAS_LENGTHS=lengths is not None,
        WARPS=tile.num_warps, PAIRS=tile.pairs, CHUNKS=max(1, tile.columns // lanes), LANES=lanes, STEPS=tile.steps,
        STAGES=tile.num_stages, LATE_TRIGGER=tile.late_trigger, PDL=pdl, num_warps=tile.num_warps, launch_pdl=pdl,
    )  # fmt: skip


def default_gemv_tile(hidden: int, dtype: torch.dtype) -> GateUpGemvTile:
    """One pair of rows a warp, up to 8 KiB of each in flight; short rows two pairs in turn.

    Measured inside decode steps on an H200: 14 and 17 us for Qwen3-30B and OLMoE, 17 and 19 with one pair.
    """
    columns = min(triton.next_power_of_2(hidden), 8192 // dtype.itemsize)
    if columns * dtype.itemsize <= 4096:
        return GateUpGemvTile(columns=columns, steps=2, num_warps=2)
    return GateUpGemvTile(columns=columns, num_warps=1)


@triton.jit
def _store_hidden(hidden_ptr, a, i, count, n, gate, up, F: tl.constexpr, SWAP: tl.constexpr):
    """Rows a of hidden from gate and up, [rows, BLOCK_N], transposed if SWAP; of rows i those below count."""
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    if SWAP:
        hidden = hidden.T
    at = hidden_ptr + a.to(tl.int64)[:, None] * F + n[None, :]
    tl.store(at, hidden.to(hidden_ptr.dtype.element_ty), mask=(i < count)[:, None] & (n < F)[None, :])


@triton.jit
def _gate_up_block(
    x_ptr, rows_ptr, gate_up_ptr, hidden_ptr, depth, slot, first, count, column,
    H: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of a slot from `first` on, and TAIL more, of which those below count are valid; rows_ptr: its."""
    # size: a kernel's prologue, loop and epilogue share their registers
    i = first + tl.arange(0, BLOCK_M)
    a = tl.load(rows_ptr + i, mask=i < count, other=0)
    x_at = x_ptr + (a // TOP_K).to(tl.int64)[:, None] * H
    first_n = column * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    if not TMA:
        gate_at = gate_up_ptr + slot.to(tl.int64) * (2 * F * H) + n[:, None] * H
    shape: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
    gate = tl.zeros(shape, tl.float32)
    up = tl.zeros(shape, tl.float32)
    if TAIL > 0:
        tail_i = first + BLOCK_M + tl.arange(0, TAIL)
        tail_a = tl.load(rows_ptr + tail_i, mask=tail_i < count, other=0)
        tail_at = x_ptr + (tail_a // TOP_K).to(tl.int64)[:, None] * H
        tail_gate = tl.zeros((BLOCK_N, TAIL), tl.float32)
        tail_up = tl.zeros((BLOCK_N, TAIL), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        whole: tl.constexpr = H % BLOCK_K == 0
        x = tl.load(x_at + k, mask=(i < count)[:, None] & (whole | (k < H)), other=0.0)
        if TMA:
            gate_weights = gate_up_ptr.load([slot * (2 * F) + first_n, start])
            up_weights = gate_up_ptr.load([slot * (2 * F) + F + first_n, start])
        elif whole and F % BLOCK_N == 0:
            gate_weights = tl.load(gate_at + k)
            up_weights = tl.load(gate_at + F * H + k)
        else:
            mask = (n < F)[:, None] & (k < H)
            gate_weights = tl.load(gate_at + k, mask=mask, other=0.0)
            up_weights = tl.load(gate_at + F * H + k, mask=mask, other=0.0)
        gate = dot_rows(x, gate_weights, gate, SWAP)
        up = dot_rows(x, up_weights, up, SWAP)
        if TAIL > 0:
            tail_x = tl.load(tail_at + k, mask=(tail_i < count)[:, None] & (whole | (k < H)), other=0.0)
            tail_gate = dot_rows(tail_x, gate_weights, tail_gate, True)
            tail_up = dot_rows(tail_x, up_weights, tail_up, True)
    _store_hidden(hidden_ptr, a, i, count, n, gate, up, F, SWAP)
    if TAIL > 0:
        _store_hidden(hidden_ptr, tail_a, tail_i, count, n, tail_gate, tail_up, F, True)


@triton.jit
def _gate_up_grouped(
    x_ptr, rows_ptr, counts_ptr, gate_up_ptr, hidden_ptr, capacity, depth,
    H: tl.constexpr, F: tl.constexpr, S: tl.constexpr, TOP_K: tl.constexpr,
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
        _gate_up_block(
            x_ptr, rows_ptr, gate_up_ptr, hidden_ptr, depth, slot, first, count, column, H, F, TOP_K, BLOCK_M, TAIL,
            BLOCK_N, BLOCK_K, STAGES, SWAP, TMA,
        )  # fmt: skip
    elif first < count:
        _gate_up_block(
            x_ptr, rows_ptr, gate_up_ptr, hidden_ptr, depth, slot, first, count, column, H, F, TOP_K, BLOCK_M, 0,
            BLOCK_N, BLOCK_K, STAGES, SWAP, TMA,
        )  # fmt: skip


def expert_gate_up_grouped(
    x: Tensor,
    rows: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    hidden: Tensor,
    *,
    top_k: int,
    tile: GateUpTile | None = None,
    pdl: bool = False,
) -> None:
    """x [T, H] and gate_up [S, 2F, H] -> hidden [T*K, F], all of one dtype; on the tensor cores.

    rows int32 [S, capacity]: the assignments a = t*K + k of slot s, of which the first counts[s] (int32) are valid; the
    order within a slot is free. Assignments of no slot get no hidden row. Any H and F, best multiples of 16 bytes.
    """
    (T, H), S, F = x.shape, gate_up.shape[0], gate_up.shape[1] // 2
    tile = tile or default_tile(T, top_k, S, H, F, x.dtype)
    blocks, one_each = grid_blocks(T, top_k, S, tile.block_m, tile.tail)
    tma = tile.tma and H * x.itemsize % 16 == 0
    weights = TensorDescriptor.from_tensor(gate_up.view(-1, H), [tile.block_n, tile.block_k]) if tma else gate_up
    _gate_up_grouped[(blocks, triton.cdiv(F, tile.block_n))](
        x, rows, counts, weights, hidden, rows.stride(0), H, H=H, F=F, S=S, TOP_K=top_k,
        BLOCK_M=tile.block_m, TAIL=tile.tail, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.num_stages,
        SWAP=tile.swap, TMA=tma, ONE_EACH=one_each, GROUP=tile.group, PDL=pdl, num_warps=tile.num_warps, launch_pdl=pdl,
    )  # fmt: skip


def default_tile(rows: int, top_k: int, num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> GateUpTile:
    """A tile for `rows` tokens of uniform routing, by how many of them an expert that gets any may expect."""
    del hidden, width  # both have been long next to every tile so far
    if dtype is torch.float32:  # no tensor cores for exact fp32
        return GateUpTile(16 if rows <= 64 else 32, 32, 32, num_stages=3, swap=False)
    block = block_rows(rows, top_k, num_experts)
    if block == 128:
        tail = tail_of(rows, top_k, num_experts, block)
        tile = GateUpTile(128, 128, 64, num_warps=8, num_stages=4, swap=False, tail=tail)
    else:
        tile = GateUpTile(block, 64, 64, num_stages=5 if block <= 32 else 4)
    stage = (tile.block_m + tile.tail + 2 * tile.block_n) * tile.block_k * dtype.itemsize
    return replace(tile, num_stages=stages_that_fit(tile.num_stages, stage))
