"""Device code of decode attention: the split kernel, the merge kernel, and the pieces they are made of.

Enters and leaves: see `decode_attention.py`, which launches them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

NO_NORM, HEAD_NORM, FULL_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# The maximum of no scores: finite, so that the difference of two is 0 and not NaN, and far below any score.
_NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait until earlier kernels are complete and their writes are seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _shares(length, WINDOW: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, KEYS: tl.constexpr):
    """(first position that is seen, positions a split takes, splits that have any: none in a padded row)."""
    seen = length
    if WINDOW is not None:
        seen = tl.minimum(length, WINDOW)
    share = tl.maximum(tl.cdiv(tl.cdiv(seen, SPLITS), KEYS) * KEYS, MIN_SPLIT)
    return length - seen, share, tl.cdiv(seen, share)


@triton.jit
def _slots(table_ptr, position, mask, BLOCK_SIZE: tl.constexpr):
    """Cache slots [N] of positions [N]."""
    block = tl.load(table_ptr + position // BLOCK_SIZE, mask=mask, other=0)
    return block * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def _keys_values(cache_ptr, slots, mask, d, HKV: tl.constexpr, D: tl.constexpr):
    """Keys and values [N, D] of one head at slots [N]; zeros where masked, whatever the memory holds."""
    at = cache_ptr + slots.to(tl.int64)[:, None] * (2 * HKV * D) + d[None, :]
    mask = mask[:, None] & (d < D)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + HKV * D, mask=mask, other=0.0)


@triton.jit
def _attend(q, k, v, seen, top, total, acc, SCALE: tl.constexpr, PER_HEAD: tl.constexpr):
    """One more tile of keys and values [N, D] into the running maximum, sum and output (base-2 softmax).

    PER_HEAD: q fp32 [1, D]; each of the N places of a tile is a stream of its own, with top and total [N] and acc
    [N, D], so that no thread waits for another. Else q [G, D] in the keys' dtype; top [G], total [G, N], acc [G, D].
    """
    if PER_HEAD:
        scores = tl.where(seen, tl.sum(k.to(tl.float32) * q, 1) * SCALE, float("-inf"))
        new_top = tl.maximum(top, scores)
        p = tl.exp2(scores - new_top)
        faded = tl.exp2(top - new_top)
        total = total * faded + p
        acc = acc * faded[:, None] + p[:, None] * v.to(tl.float32)
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        faded = tl.exp2(top - new_top)[:, None]
        total = total * faded + p
        acc = tl.dot(p.to(v.dtype), v, acc * faded, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def full_scales(
    q_ptr, k_ptr, wants_k, Q_SIZE: tl.constexpr, K_SIZE: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr
):
    """1 / RMS of the whole query [Q_SIZE] and the whole key [K_SIZE], in one reduction; no key unless wanted."""
    i = tl.arange(0, BLOCK)
    q = tl.load(q_ptr + i, mask=i < Q_SIZE, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + i, mask=(i < K_SIZE) & wants_k, other=0.0).to(tl.float32)
    q_sum, k_sum = tl.reduce((q * q, k * k), 0, _add_pairs)
    return tl.rsqrt(q_sum / Q_SIZE + EPS), tl.rsqrt(k_sum / K_SIZE + EPS)


@triton.jit
def clip(x, CLIP: tl.constexpr):
    if CLIP is not None:
        x = tl.minimum(tl.maximum(x, -CLIP), CLIP)
    return x


@triton.jit
def normed_rotated(
    x, other, weight, other_weight, scale, cos, sin, D: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """Heads x [G, D] normed, clipped and rotated, in fp32. `other` holds each dimension's partner in its pair."""
    x, other = x.to(tl.float32), other.to(tl.float32)
    if NORM == HEAD_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
    if NORM != NO_NORM:
        x = x * scale * weight.to(tl.float32)
        other = other * scale * other_weight.to(tl.float32)
    return clip(x, CLIP) * cos + clip(other, CLIP) * sin


@triton.jit
def _weights(weight_ptr, at, partner_at, d, partner, mask, D: tl.constexpr, NORM: tl.constexpr):
    """Weights of the norm and of each dimension's partner: [G, D] if full, [1, D] if by head."""
    if NORM == FULL_NORM:
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        other = tl.load(weight_ptr + partner_at, mask=mask, other=0.0)
    elif NORM == HEAD_NORM:
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)[None, :]
        other = tl.load(weight_ptr + partner, mask=d < D, other=0.0)[None, :]
    else:
        weight, other = 1.0, 1.0
    return weight, other


@triton.jit
def _attend_all(
    q, k, v, cache_ptr, table_ptr, next_slots, base, count, n, d,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE: tl.constexpr, KEYS: tl.constexpr,
    PER_HEAD: tl.constexpr, PAD_HEADS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All `count` items of a split, item i at position base + i: (maximum [G], sum [G], output [G, D], not divided).

    k, v: the first tile, already there; next_slots: where the second is.
    """
    ROWS: tl.constexpr = KEYS if PER_HEAD else PAD_HEADS
    top = tl.full([ROWS], _NOTHING, tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if PER_HEAD:
        q = q.to(tl.float32)
        total = tl.zeros([KEYS], tl.float32)
    else:
        total = tl.zeros([PAD_HEADS, KEYS], tl.float32)
    if STAGES == 1:
        for item in tl.range(0, count, KEYS, num_stages=1):
            ahead = item + KEYS + n
            next_k, next_v = _keys_values(cache_ptr, next_slots, ahead < count, d, HKV, D)
            next_slots = _slots(table_ptr, base + ahead + KEYS, ahead + KEYS < count, BLOCK_SIZE)
            top, total, acc = _attend(q, k, v, item + n < count, top, total, acc, SCALE, PER_HEAD)
            k, v = next_k, next_v
    else:
        top, total, acc = _attend(q, k, v, n < count, top, total, acc, SCALE, PER_HEAD)
        for item in tl.range(KEYS, count, KEYS, num_stages=STAGES):
            slots = _slots(table_ptr, base + item + n, item + n < count, BLOCK_SIZE)
            k, v = _keys_values(cache_ptr, slots, item + n < count, d, HKV, D)
            top, total, acc = _attend(q, k, v, item + n < count, top, total, acc, SCALE, PER_HEAD)
    if PER_HEAD:
        streams = top
        top = tl.max(streams, 0, keep_dims=True)
        weight = tl.exp2(streams - top)
        total = tl.sum(total * weight, 0, keep_dims=True)
        acc = tl.sum(acc * weight[:, None], 0, keep_dims=True)
    else:
        total = tl.sum(total, 1)
    return top, total, acc


@triton.jit
def split_kernel(
    qkv_ptr, cache_ptr, lengths_ptr, tables_ptr, stride_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    out_ptr, partial_ptr, logsum_ptr,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, CLIP: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, KEYS: tl.constexpr, PER_HEAD: tl.constexpr, HEADS: tl.constexpr,
    PAD_HEADS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # size: one pass from registers to registers; what can be cut off is above.
    """Grid (Hq / HEADS, S, T). HEADS query heads of one key head, padded to PAD_HEADS rows."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    table_ptr = tables_ptr + row * tl.load(stride_ptr)

    g = tl.arange(0, PAD_HEADS)
    d = tl.arange(0, BLOCK_D)
    heads = tl.program_id(0) * HEADS + g
    q_at = heads[:, None] * D + d[None, :]
    q_mask = (g < HEADS)[:, None] & (d < D)[None, :]
    first, share, active = _shares(length, WINDOW, SPLITS, MIN_SPLIT, KEYS)
    if split >= active:
        _wait(PDL)
        if SPLITS == 1:
            zeros = tl.zeros([PAD_HEADS, BLOCK_D], out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * (HQ * D) + q_at, zeros, mask=q_mask)
        return

    # Before the wait: whatever no kernel of this step writes. The row's last split takes the newest position first
    # (item 0, from registers), then its earlier ones; so only the first tile needs a special case.
    newest = length - 1
    start = first + split * share
    count = tl.minimum(share, length - start)
    takes_newest = split == active - 1
    base = start - takes_newest.to(tl.int32)  # item i is position base + i
    n = tl.arange(0, KEYS)
    is_newest = takes_newest & (n == 0)
    kv_head = tl.program_id(0) * HEADS // (HQ // HKV)
    head_ptr = cache_ptr + kv_head * D
    in_cache = (n < count) & (is_newest == 0)
    k, v = _keys_values(head_ptr, _slots(table_ptr, base + n, in_cache, BLOCK_SIZE), in_cache, d, HKV, D)
    next_slots = _slots(table_ptr, base + KEYS + n, KEYS + n < count, BLOCK_SIZE)
    new_slot = tl.load(table_ptr + newest // BLOCK_SIZE) * BLOCK_SIZE + newest % BLOCK_SIZE

    # Dimensions i and i + R/2 are a pair, those from R on stay. Sums with a shift keep loads wide.
    HALF: tl.constexpr = R // 2
    partner = d + tl.where(d < HALF, HALF, tl.where(d < R, -HALF, 0))
    angle = newest * HALF + d - tl.where(d < HALF, 0, HALF)
    cos = tl.load(cos_ptr + angle, mask=d < R, other=1.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=d < R, other=0.0)[None, :]
    sin = tl.where(d[None, :] < HALF, -sin, sin)
    q_partner_at = heads[:, None] * D + partner[None, :]
    k_at, k_partner_at = (kv_head * D + d)[None, :], (kv_head * D + partner)[None, :]
    k_mask = ((d < D) & takes_newest)[None, :]
    q_weight, q_partner_weight = _weights(q_weight_ptr, q_at, q_partner_at, d, partner, q_mask, D, NORM)
    k_weight, k_partner_weight = _weights(k_weight_ptr, k_at, k_partner_at, d, partner, k_mask, D, NORM)

    _wait(PDL)
    q_ptr = qkv_ptr + row * ((HQ + 2 * HKV) * D)
    k_ptr = q_ptr + HQ * D
    q_scale, k_scale = 1.0, 1.0
    if NORM == FULL_NORM:
        BLOCK: tl.constexpr = triton.next_power_of_2(HQ * D)
        q_scale, k_scale = full_scales(q_ptr, k_ptr, takes_newest, HQ * D, HKV * D, BLOCK, EPS)
    raw_q = tl.load(q_ptr + q_at, mask=q_mask, other=0.0)  # [G, D]
    raw_q_partner = tl.load(q_ptr + q_partner_at, mask=q_mask, other=0.0)
    raw_k = tl.load(k_ptr + k_at, mask=k_mask, other=0.0)  # [1, D]
    raw_k_partner = tl.load(k_ptr + k_partner_at, mask=k_mask, other=0.0)
    raw_v = tl.load(k_ptr + HKV * D + k_at, mask=k_mask, other=0.0)
    q = normed_rotated(raw_q, raw_q_partner, q_weight, q_partner_weight, q_scale, cos, sin, D, NORM, EPS, CLIP)
    new_k = normed_rotated(raw_k, raw_k_partner, k_weight, k_partner_weight, k_scale, cos, sin, D, NORM, EPS, CLIP)
    # Rounded as later steps will read them.
    q, new_k, new_v = q.to(k.dtype), new_k.to(k.dtype), clip(raw_v.to(tl.float32), CLIP).to(k.dtype)
    writes = k_mask & (tl.program_id(0) * HEADS % (HQ // HKV) == 0)
    new_at = head_ptr + new_slot.to(tl.int64) * (2 * HKV * D) + d[None, :]
    tl.store(new_at, new_k, mask=writes)
    tl.store(new_at + HKV * D, new_v, mask=writes)
    k = tl.where(is_newest[:, None], new_k, k)
    v = tl.where(is_newest[:, None], new_v, v)

    top, total, acc = _attend_all(
        q, k, v, head_ptr, table_ptr, next_slots, base, count, n, d,
        HKV, D, BLOCK_SIZE, SCALE, KEYS, PER_HEAD, PAD_HEADS, BLOCK_D, STAGES,
    )  # fmt: skip
    acc = acc * (1.0 / total)[:, None]
    if SPLITS == 1:
        tl.store(out_ptr + row * (HQ * D) + q_at, acc.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        at = (row * HQ + heads) * SPLITS + split  # [G]
        tl.store(partial_ptr + at[:, None] * D + d[None, :], acc, mask=q_mask)
        tl.store(logsum_ptr + at, top + tl.log2(total), mask=g < HEADS)


@triton.jit
def merge_kernel(
    partial_ptr, logsum_ptr, lengths_ptr, out_ptr, HQ: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, KEYS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (Hq, T). Weighs the outputs of one head's splits by their sums; zeros for a padded row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    _, _, active = _shares(tl.load(lengths_ptr + row), WINDOW, SPLITS, MIN_SPLIT, KEYS)
    _wait(PDL)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    head = row * HQ + tl.program_id(0)
    mask = (s < active)[:, None] & (d < D)[None, :]
    logsum = tl.load(logsum_ptr + head * SPLITS + s, mask=s < active, other=_NOTHING)
    partial = tl.load(partial_ptr + head * (SPLITS * D) + s[:, None] * D + d[None, :], mask=mask, other=0.0)
    weight = tl.exp2(logsum - tl.max(logsum, 0))  # 0 where no split was; in a padded row 1, of outputs 0
    acc = tl.sum(partial * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + head * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
