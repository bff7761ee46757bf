"""The kernels of `norm_linear`: two for few rows, which hold weights in registers, and one for many.

Enters: x [T, K], weight [N, K]. Leaves: [T, N], or fp32 partial sums [S, T, N] for `_reduce`.

In the first two the order of a tile's dimensions decides where Triton puts it: the last one, contiguous in memory,
into one thread (16 bytes), then the first ones into the lanes of a warp and on into warps, what remains into registers.
Tensors built alike so meet in the same threads, without shared memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: RUF005 - Triton compiles tuples that are added, not tuples that are unpacked

from __future__ import annotations

import triton
import triton.language as tl

_ZERO = tl.constexpr("popc.b32 $0, $1; shr.u32 $0, $0, 6;")
_PREFETCH = tl.constexpr("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;")


@triton.jit
def _prefetch(w_ptr, row, column, N, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Ask L2 for COLUMNS columns of ROWS rows of the weight; nobody waits for them.

    The 32 threads of a warp ask for the same, which is one request; different ones would be made one after the other.
    """
    PARTS: tl.constexpr = max(1, min(WARPS // ROWS, COLUMNS // 64))
    WIDTH: tl.constexpr = COLUMNS // PARTS
    job = tl.arange(0, 32 * ROWS * PARTS) // 32
    rows = tl.minimum(row + job % ROWS, N - 1).to(tl.int64)
    columns = tl.minimum(column + job // ROWS * WIDTH, K - WIDTH)
    size = WIDTH * (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    at = w_ptr + rows * K + columns
    tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _load_weights(tile, k, START: tl.constexpr, STOP: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr):
    """Blocks START ... STOP - 1 of columns of the weight, those that there are: a tuple. Nobody reads them again."""
    blocks = tl.tuple([])
    for i in tl.static_range(START, min(STOP, (K + BLOCK_K - 1) // BLOCK_K)):
        if (i + 1) * BLOCK_K <= K:
            w = tl.load(tile + i * BLOCK_K, eviction_policy="evict_first")
        else:
            w = tl.load(tile + i * BLOCK_K, mask=k + i * BLOCK_K < K, other=0.0, eviction_policy="evict_first")
        blocks = blocks + (w,)
    return blocks


@triton.jit
def _load_rows(
    ptr, stride, k, seen, START: tl.constexpr, STOP: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr,
    COUNT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """As `_load_weights`, of COUNT rows each: columns k to k + VEC - 1 [a, b, c, d, VEC] of k [a, b, c, d, 1]."""
    blocks = tl.tuple([])
    for i in tl.static_range(START, min(STOP, (K + BLOCK_K - 1) // BLOCK_K)):
        for row in tl.static_range(COUNT):
            blocks = blocks + (_load_row(ptr + row * stride, k + i * BLOCK_K, seen, K, VEC, (i + 1) * BLOCK_K <= K),)
    return blocks


@triton.jit
def _load_row(ptr, k, seen, K: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr):
    """Zero where not seen and, unless WHOLE, from column K on.

    Sixteen bytes a load: fp32 rows that meet weights of two bytes come as two halves.
    """
    HALVES: tl.constexpr = ptr.dtype.element_ty == tl.float32 and VEC == 8
    WIDTH: tl.constexpr = 4 if HALVES else VEC
    at = k + tl.arange(0, WIDTH)[None, None, None, None, :]
    mask = seen if WHOLE else seen & (at < K)
    row = tl.load(ptr + at, mask=mask, other=0.0)
    if HALVES:
        mask = seen if WHOLE else seen & (at + 4 < K)
        both = tl.join(row, tl.load(ptr + at + 4, mask=mask, other=0.0))
        row = tl.reshape(tl.permute(both, (0, 1, 2, 3, 5, 4)), row.shape[:4] + [VEC])
    return row


@triton.jit
def _copies(value, COUNT: tl.constexpr):
    """A tuple of COUNT times the same."""
    copies = tl.tuple([])
    for _ in tl.static_range(COUNT):
        copies = copies + (value,)
    return copies


@triton.jit
def _late_zero(ptr, OPAQUE: tl.constexpr):
    """0.0, but no compiler knows: what depends on it stays below, what is loaded above stays there.

    Else the assembler moves loads down to where their results are needed, a few at a time, and latencies add up.
    """
    zero = 0.0
    if OPAQUE:
        tl.debug_barrier()
        word = tl.load(ptr.to(tl.pointer_type(tl.int32)))
        zero = tl.inline_asm_elementwise(_ZERO, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
        zero = zero.to(tl.float32, bitcast=True)
    return zero


@triton.jit
def _stack(rows):
    """1, 2, 4 or 8 tensors of one shape -> one, with their number as last dimension."""
    COUNT: tl.constexpr = len(rows)
    if COUNT == 1:
        stacked = tl.expand_dims(rows[0], -1)
    elif COUNT == 2:
        stacked = tl.join(rows[0], rows[1])
    elif COUNT == 4:
        stacked = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
    else:
        even = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
        odd = tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7]))
        stacked = tl.join(even, odd)
    return tl.reshape(stacked, rows[0].shape + [COUNT])


@triton.jit
def _add_all(parts):
    COUNT: tl.constexpr = len(parts)
    total = parts[0]
    for i in tl.static_range(1, COUNT):
        total = total + parts[i]
    return total


@triton.jit
def _gemv(
    x_ptr, w_ptr, norm_ptr, bias_ptr, out_ptr, N, x_stride, out_stride,
    K: tl.constexpr, T: tl.constexpr, PAD_T: tl.constexpr, EPS: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, WARPS: tl.constexpr, WARPS_K: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr, X_AHEAD: tl.constexpr, PREFETCH: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # size: one pass from registers to registers; what can be cut off is above.
    """Multiply-adds in fp32. A tile is [lanes, groups of columns, warps, rows of a thread, VEC columns]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    GROUPS: tl.constexpr = 32 // LANES * WARPS_K
    BLOCK_K: tl.constexpr = GROUPS * VEC
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WARPS_N: tl.constexpr = WARPS // WARPS_K
    BLOCK_N: tl.constexpr = LANES * WARPS_N * ROWS

    start = tl.program_id(0) * BLOCK_N
    lane = tl.arange(0, LANES)[:, None, None, None, None]
    group = tl.arange(0, GROUPS)[None, :, None, None, None]
    warp = tl.arange(0, WARPS_N)[None, None, :, None, None]
    n = start + (warp * ROWS + tl.arange(0, ROWS)[None, None, None, :, None]) * LANES + lane
    column = group * VEC + 0 * (lane + warp)  # of x: the same address for all that share it
    k = group * VEC + tl.arange(0, VEC)[None, None, None, None, :]
    w_tile = w_ptr + tl.minimum(n, N - 1).to(tl.int64) * K + k
    seen = column < K + BLOCK_K

    w = _load_weights(w_tile, k, 0, AHEAD, BLOCK_K, K)
    norm = _load_rows(norm_ptr, 0, column, seen, 0, X_AHEAD, BLOCK_K, K, NORM, VEC)
    n = tl.reshape(n, (LANES, WARPS_N, ROWS, 1))
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32) if BIAS else 0.0
    if PDL and PREFETCH > 0:
        _prefetch(w_ptr, start, AHEAD * BLOCK_K, N, K, BLOCK_N, PREFETCH, WARPS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    t = tl.arange(0, PAD_T)[None, None, None, :]
    out = out_ptr + t * out_stride + n
    stored = (n < N) & (t < T)
    before = tl.load(out, mask=stored, other=0.0) if RESIDUAL else 0.0
    x = _load_rows(x_ptr, x_stride, column, seen, 0, X_AHEAD, BLOCK_K, K, T, VEC)
    zero = _late_zero(x_ptr, PDL)
    sums = _copies(tl.zeros((LANES, GROUPS, WARPS_N, ROWS), tl.float32), PAD_T)
    squares = _copies(tl.zeros((LANES, GROUPS, WARPS_N, 1), tl.float32), PAD_T)
    for i in tl.static_range(STEPS):
        w = w + _load_weights(w_tile, k, i + AHEAD, i + AHEAD + 1, BLOCK_K, K)
        x = x + _load_rows(x_ptr, x_stride, column, seen, i + X_AHEAD, i + X_AHEAD + 1, BLOCK_K, K, T, VEC)
        norm = norm + _load_rows(norm_ptr, 0, column, seen, i + X_AHEAD, i + X_AHEAD + 1, BLOCK_K, K, NORM, VEC)
        wide = w[i].to(tl.float32)
        for row in tl.static_range(T):
            x_row = x[i * T + row].to(tl.float32)
            if NORM:
                squares = squares[1:] + (squares[0] + tl.sum(x_row * x_row, 4),)
                x_row = x_row * (norm[i].to(tl.float32) + zero)
            else:
                x_row = x_row * (1.0 + zero)
            sums = sums[1:] + (sums[0] + tl.sum(wide * x_row, 4),)
        # Each turn takes the first and appends it: after PAD_T turns all are in their places.
        sums = sums[PAD_T - T :] + sums[: PAD_T - T]
        squares = squares[PAD_T - T :] + squares[: PAD_T - T]
    total = tl.sum(_stack(sums), 1)  # [lanes, warps, rows, T]
    if NORM:
        total = total * tl.rsqrt(tl.sum(_stack(squares), 1) / K + EPS)
    tl.store(out, (total + bias + before).to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _direct(
    x_ptr, w_ptr, norm_ptr, bias_ptr, out_ptr, T, N, x_stride, out_stride,
    K: tl.constexpr, EPS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, WARPS_K: tl.constexpr,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, X_AHEAD: tl.constexpr, CHAINS: tl.constexpr, PREFETCH: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # size: one pass from registers to registers; what can be cut off is above.
    """Tensor cores fed from registers. A warp: 16 * ROWS rows of the weight, a part of K, times x^T [K, 8 * TOKENS].

    A thread of the product mma.m16n8k16 holds, of rows g and g + 8, columns 2q, 2q+1, 2q+8, 2q+9. Which 16 columns of
    memory these are is free, as long as weight and x agree: so a thread loads 8 neighbours, for two products.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    WARPS_N: tl.constexpr = WARPS // WARPS_K
    BLOCK_K: tl.constexpr = 32 * WARPS_K
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WARP_N: tl.constexpr = 16 * ROWS
    BLOCK_N: tl.constexpr = WARP_N * WARPS_N
    BLOCK_T: tl.constexpr = 8 * TOKENS
    # Triton gives a thread neighbouring columns in fours where their operand was joined from two loads (x in fp32).
    PAIR: tl.constexpr = 4 if x_ptr.dtype.element_ty == tl.float32 else 2

    start = tl.program_id(0) * BLOCK_N
    q = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None]
    n = start + warp // WARPS_K * WARP_N + tl.arange(0, 2 * ROWS)[None, None, None, :, None] * 8 + g
    row = tl.arange(0, TOKENS)[None, None, None, :, None] * 8 + g
    column = (warp % WARPS_K * 4 + q) * 8
    k = column + tl.arange(0, 8)[None, None, None, None, :]
    w_tile = w_ptr + tl.minimum(n, N - 1).to(tl.int64) * K + k
    x_row = x_ptr + row * x_stride
    seen = row < T
    for_all = column + 0 * g  # of the norm's weight: the same address for all that share it
    always = for_all < K + BLOCK_K

    w = _load_weights(w_tile, k, 0, AHEAD, BLOCK_K, K)
    norm = _load_rows(norm_ptr, 0, for_all, always, 0, X_AHEAD, BLOCK_K, K, NORM, 8)
    n = start + tl.arange(0, BLOCK_N)[:, None]
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32) if BIAS else 0.0
    if PDL and PREFETCH > 0:
        _prefetch(w_ptr, start, AHEAD * BLOCK_K, N, K, BLOCK_N, PREFETCH, WARPS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    t = tl.arange(0, BLOCK_T)[None, :]
    out = out_ptr + t * out_stride + n
    stored = (n < N) & (t < T)
    before = tl.load(out, mask=stored, other=0.0) if RESIDUAL else 0.0
    x = _load_rows(x_row, 0, column, seen, 0, X_AHEAD, BLOCK_K, K, 1, 8)
    zero = _late_zero(x_ptr, PDL)
    squares = tl.zeros((4, 8, WARPS, TOKENS), tl.float32)
    chains = _copies(tl.zeros((WARPS, WARP_N, BLOCK_T), tl.float32) + zero, CHAINS)
    for i in tl.static_range(STEPS):
        w = w + _load_weights(w_tile, k, i + AHEAD, i + AHEAD + 1, BLOCK_K, K)
        x = x + _load_rows(x_row, 0, column, seen, i + X_AHEAD, i + X_AHEAD + 1, BLOCK_K, K, 1, 8)
        norm = norm + _load_rows(norm_ptr, 0, for_all, always, i + X_AHEAD, i + X_AHEAD + 1, BLOCK_K, K, NORM, 8)
        rows = x[i]
        if NORM:
            rows = rows.to(tl.float32)
            squares += tl.sum(rows * rows, 4)
            rows = rows * (norm[i].to(tl.float32) + zero)
        rows = rows.to(w_ptr.dtype.element_ty)
        # The 8 columns of a thread are [which product, which half of its 16 columns, neighbours].
        a = tl.permute(tl.reshape(w[i], (4, 8, WARPS, 2 * ROWS, 4 // PAIR, 2, PAIR)), (2, 3, 1, 4, 5, 0, 6))
        b = tl.permute(tl.reshape(rows, (4, 8, WARPS, TOKENS, 4 // PAIR, 2, PAIR)), (2, 4, 5, 0, 6, 3, 1))
        a = tl.reshape(a, (WARPS, WARP_N, 32))
        b = tl.reshape(b, (WARPS, 32, BLOCK_T))
        # The chains take turns, so that a product need not wait for the one before it.
        chains = chains[1:] + (tl.dot(a, b, chains[0], input_precision="ieee"),)
    total = tl.reshape(_add_all(chains), (WARPS_N, WARPS_K, WARP_N, BLOCK_T))
    total = tl.reshape(tl.sum(total, 1), (BLOCK_N, BLOCK_T))
    if NORM:
        squares = tl.sum(tl.reshape(squares, (4, 8, WARPS_N, WARPS_K, TOKENS)), 3)
        squares = tl.max(tl.sum(squares, 0), 1)  # [8, TOKENS]; the same in every row of warps
        squares = tl.reshape(tl.permute(squares, (1, 0)), (1, BLOCK_T))
        total = total * tl.rsqrt(squares / K + EPS)
    tl.store(out, (total + bias + before).to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _dot(
    x_ptr, w_ptr, bias_ptr, out_ptr, partial_ptr, T, N, x_stride, out_stride,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # size: one pass; what can be cut off is above.
    """Grid (blocks of T, blocks of N, splits of K): programs that share weights run at the same time."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    STEPS: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    WHOLE: tl.constexpr = K == STEPS * SPLITS * BLOCK_K
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(2) * (STEPS * BLOCK_K)
    k = first + tl.arange(0, BLOCK_K)
    w_tile = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    x_tile = x_ptr + tl.minimum(t, T - 1)[:, None] * x_stride + k[None, :]
    if PDL:
        if PREFETCH > 0:
            _prefetch(w_ptr, tl.program_id(1) * BLOCK_N, first, N, K, BLOCK_N, PREFETCH, WARPS)
        tl.extra.cuda.gdc_wait()

    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for i in tl.range(0, STEPS, num_stages=STAGES):
        if WHOLE:
            w = tl.load(w_tile + i * BLOCK_K, eviction_policy="evict_first")
            x = tl.load(x_tile + i * BLOCK_K)
        else:
            seen = k + i * BLOCK_K < K
            w = tl.load(w_tile + i * BLOCK_K, mask=seen[:, None], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_tile + i * BLOCK_K, mask=seen[None, :], other=0.0)
        total = tl.dot(x.to(w.dtype), w, total, input_precision="ieee")

    stored = (t < T)[:, None] & (n < N)[None, :]
    if SPLITS == 1:
        if BIAS:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        out = out_ptr + t[:, None] * out_stride + n[None, :]
        if RESIDUAL:
            total += tl.load(out, mask=stored, other=0.0)
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        row = tl.program_id(2) * T + t
        tl.store(partial_ptr + row.to(tl.int64)[:, None] * N + n[None, :], total, mask=stored)


@triton.jit
def _reduce(
    partial_ptr, bias_ptr, out_ptr, T, N, out_stride,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add partial sums [SPLITS, T, N] up, in their order. Grid (blocks of N, T)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1)
    seen = n < N
    bias = tl.load(bias_ptr + n, mask=seen, other=0.0).to(tl.float32) if BIAS else 0.0
    if PDL:
        tl.extra.cuda.gdc_wait()
    out = out_ptr + t * out_stride + n
    before = tl.load(out, mask=seen, other=0.0) if RESIDUAL else 0.0
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (split * T + t).to(tl.int64) * N + n, mask=seen, other=0.0)
    tl.store(out, (total + bias + before).to(out_ptr.dtype.element_ty), mask=seen)


@triton.jit
def _reduce_norm(
    partial_ptr, bias_ptr, out_ptr, norm_ptr, normed_ptr, T, N: tl.constexpr, out_stride,
    SPLITS: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_reduce` onto the residual stream, and the norm of what comes out. Grid (T,)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.arange(0, BLOCK)
    seen = n < N
    bias = tl.load(bias_ptr + n, mask=seen, other=0.0).to(tl.float32) if BIAS else 0.0
    norm = tl.load(norm_ptr + n, mask=seen, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0)
    out = out_ptr + t * out_stride + n
    before = tl.load(out, mask=seen, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (split * T + t).to(tl.int64) * N + n, mask=seen, other=0.0)
    total = total + bias + before
    tl.store(out, total, mask=seen)
    total = tl.where(seen, total, 0.0)
    total *= tl.rsqrt(tl.sum(total * total, 0) / N + EPS)
    tl.store(normed_ptr + t * N + n, (total * norm).to(normed_ptr.dtype.element_ty), mask=seen)
