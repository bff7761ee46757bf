"""Queries, keys and values of many rows made ready for attention, in one launch.

Enters: a projection's rows and the layer's cache. Leaves: queries, and the rows' keys and values in the cache. What is
computed is what decode attention does with its newest token (`decode_attention_kernels.py`), to the last bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.decode_attention import QKNormWeights
from flexmoe.kernels.triton.decode_attention import norm_kind
from flexmoe.kernels.triton.decode_attention_kernels import (
    FULL_NORM,
    HEAD_NORM,
    clip,
    full_scales,
    normed_rotated,
)

_HEADS = 8  # that a program takes; all of them where the norm is over all
_PER_WARP, _PER_WARP_OF_ALL = 1024, 512  # numbers, of few heads and of all
_AT_ONCE_PER_WARP = 128  # of all: 8 bytes a thread


@triton.jit
def _weight(q_weight_ptr, k_weight_ptr, heads, is_q, is_k, d, HQ: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):
    """Weights of the norm for dimensions d of each head, [G, D]."""
    inside = (d < D)[None, :]
    weight = 1.0
    if NORM == HEAD_NORM:
        q_weight, k_weight = tl.load(q_weight_ptr + d, mask=d < D), tl.load(k_weight_ptr + d, mask=d < D)
        weight = tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])
    elif NORM == FULL_NORM:
        at = heads[:, None] * D + d[None, :]
        q_weight = tl.load(q_weight_ptr + at, mask=is_q[:, None] & inside, other=0.0)
        k_weight = tl.load(k_weight_ptr + at - HQ * D, mask=is_k[:, None] & inside, other=0.0)
        weight = tl.where(is_q[:, None], q_weight, k_weight)
    return weight


@triton.jit
def _rotate_and_store(
    qkv_ptr, cache_ptr, positions_ptr, slots_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, out_ptr, fresh_ptr,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    CLIP: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, ceil((Hq + 2 Hkv) / HEADS)); STEP heads at once. With FULL_NORM a program has all of them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    position, slot = tl.load(positions_ptr + row), tl.load(slots_ptr + row).to(tl.int64)
    HALF: tl.constexpr = R // 2
    partner = d + tl.where(d < HALF, HALF, tl.where(d < R, -HALF, 0))
    angle = position * HALF + d - tl.where(d < HALF, 0, HALF)
    cos = tl.load(cos_ptr + angle, mask=d < R, other=1.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=d < R, other=0.0)[None, :]
    sin = tl.where(d[None, :] < HALF, -sin, sin)
    qkv_ptr += row * ((HQ + 2 * HKV) * D)
    q_scale, k_scale = 1.0, 1.0
    if NORM == FULL_NORM:
        BLOCK: tl.constexpr = triton.next_power_of_2(HQ * D)
        q_scale, k_scale = full_scales(qkv_ptr, qkv_ptr + HQ * D, True, HQ * D, HKV * D, BLOCK, EPS)
    for first in tl.static_range(0, HEADS, STEP):
        heads = tl.program_id(1) * HEADS + first + tl.arange(0, STEP)
        is_q, is_k = heads < HQ, (heads >= HQ) & (heads < HQ + HKV)
        mask = (heads < HQ + 2 * HKV)[:, None] & (d < D)[None, :]
        at = heads[:, None] * D + d[None, :]
        raw = tl.load(qkv_ptr + at, mask=mask, other=0.0)
        made = clip(raw.to(tl.float32), CLIP)
        if NORM != FULL_NORM or first < HQ + HKV:  # not values alone
            raw_partner = tl.load(qkv_ptr + heads[:, None] * D + partner[None, :], mask=mask, other=0.0)
            scale = tl.where(is_q, q_scale, k_scale)[:, None]
            weight = _weight(q_weight_ptr, k_weight_ptr, heads, is_q, is_k, d, HQ, D, NORM)
            partner_weight = _weight(q_weight_ptr, k_weight_ptr, heads, is_q, is_k, partner, HQ, D, NORM)
            rotated = normed_rotated(raw, raw_partner, weight, partner_weight, scale, cos, sin, D, NORM, EPS, CLIP)
            made = tl.where((is_q | is_k)[:, None], rotated, made)
        tl.store(out_ptr + row * (HQ * D) + at, made.to(out_ptr.dtype.element_ty), mask=mask & is_q[:, None])
        kept = mask & (heads >= HQ)[:, None]
        cached = cache_ptr + slot * (2 * HKV * D) + at - HQ * D
        tl.store(cached, made.to(cache_ptr.dtype.element_ty), mask=kept & (slot >= 0))
        if fresh_ptr is not None:
            tl.store(fresh_ptr + row * (2 * HKV * D) + at - HQ * D, made.to(fresh_ptr.dtype.element_ty), mask=kept)


def rotate_and_store(
    qkv: Tensor,
    cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    *,
    norm: QKNormWeights | None = None,
    clip: float | None = None,
    fresh: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """As `flexmoe.kernels.rotate_and_store`, queries to out [T, Hq D]; positions and slots int32, all contiguous.

    fresh: [T, 2, Hkv, D], which gets what the cache gets, row after row.
    """
    num_kv_heads, head_dim = cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    block_d, heads = triton.next_power_of_2(head_dim), num_heads + 2 * num_kv_heads
    step, of_program, num_warps = _HEADS, _HEADS, max(1, _HEADS * block_d // _PER_WARP)
    if norm is not None and norm.full:
        num_warps = _warps_of_all(triton.next_power_of_2(heads) * block_d, block_d)
        step = max(1, num_warps * _AT_ONCE_PER_WARP // block_d)
        of_program = triton.cdiv(heads, step) * step
    _rotate_and_store[(len(qkv), triton.cdiv(heads, of_program))](
        qkv, cache, positions, slots, cos, sin, norm and norm.query, norm and norm.key, out, fresh,
        HQ=num_heads, HKV=num_kv_heads, D=head_dim, R=2 * cos.shape[1], NORM=norm_kind(norm),
        EPS=norm.eps if norm else 0.0, CLIP=clip, HEADS=of_program, STEP=step, BLOCK_D=block_d, PDL=pdl,
        num_warps=num_warps, launch_pdl=pdl,
    )  # fmt: skip


def _warps_of_all(numbers: int, block_d: int) -> int:
    """Of a program whose norm is over all of so many numbers: sums in the order that decode attention has."""
    return max(4 if block_d >= 64 else 2, min(16, numbers // _PER_WARP_OF_ALL))
