"""Attention of a decode step over the paged KV cache: the rows' form, and the operation in plain torch.

Enters: the raw projection of T rows that are each the newest token of a sequence, and one layer's cache. Leaves: the
attention of every row, and its new key and value in the cache. `kernels/triton/decode_attention.py` does it in two
launches; what stands here is the reference that it is tested against, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """T rows that are each the newest token of a sequence.

    lengths: int32 [T], keys of each row, this token included; 0 marks a padded row. tables: int32, one-dimensional;
    the blocks of row t's sequence are tables[t * stride], tables[t * stride + 1], ... table_stride: int32 [1] that
    holds that stride; a tensor, since a captured graph keeps its arguments while the stride changes from step to step.
    block_size: slots of a block, a power of two.
    """

    lengths: Tensor
    tables: Tensor
    table_stride: Tensor
    block_size: int


@dataclass(frozen=True, slots=True)
class QKNormWeights:
    """RMS norm of queries and keys: over each head (weights [D]), or, if `full`, over whole projections.

    Full weights are [Hq * D] for the queries and [Hkv * D] for the keys.
    """

    query: Tensor
    key: Tensor
    eps: float
    full: bool


def decode_attention(
    qkv: Tensor,
    cache: Tensor,
    rows: DecodeRows,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    *,
    norm: QKNormWeights | None = None,
    clip: float | None = None,
    window: int | None = None,
) -> None:
    """Norm, clip, rotate, write the cache, attend. Copies to the host: for tests, not for serving.

    qkv: [T, (Hq + 2 Hkv) D]. cache: [slots, 2, Hkv, D]. cos, sin: fp32 [P, R/2] by position; dimensions i and
    i + R/2 of a head are a pair, those from R <= D on stay. out: [T, Hq * D]. window: how many latest keys are seen.
    All is computed in fp32; queries, keys and values are rounded to the cache's dtype once, before they are used.
    """
    num_kv_heads, head_dim = cache.shape[2:]
    stride = int(rows.table_stride)
    query, key, value = _split(qkv.float(), num_kv_heads, head_dim, norm, clip)
    for t, length in enumerate(rows.lengths.tolist()):
        if length == 0:
            out[t] = 0
            continue
        rotation = cos[length - 1], sin[length - 1]
        positions = torch.arange(length, device=qkv.device)
        blocks = rows.tables[t * stride : (t + 1) * stride].long()[positions // rows.block_size]
        slots = blocks * rows.block_size + positions % rows.block_size
        cache[slots[-1], 0] = _rotate(key[t], *rotation).to(cache.dtype)
        cache[slots[-1], 1] = value[t].to(cache.dtype)
        seen = cache[slots[-window:] if window else slots].float()  # [L, 2, Hkv, D]
        q = _rotate(query[t], *rotation).to(cache.dtype).float().view(num_kv_heads, -1, head_dim)
        scores = torch.einsum("hgd,lhd->hgl", q, seen[:, 0]) * head_dim**-0.5
        out[t] = torch.einsum("hgl,lhd->hgd", scores.softmax(-1), seen[:, 1]).flatten().to(out.dtype)


def _split(
    qkv: Tensor, num_kv_heads: int, head_dim: int, norm: QKNormWeights | None, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, Hq, D], keys and values [T, Hkv, D], normed and clipped."""
    kv_size = num_kv_heads * head_dim
    query, key, value = qkv.split((qkv.shape[1] - 2 * kv_size, kv_size, kv_size), -1)
    if norm is not None:
        query = _norm(query, norm.query, head_dim, norm)
        key = _norm(key, norm.key, head_dim, norm)
    parts = [t.unflatten(-1, (-1, head_dim)) for t in (query, key, value)]
    if clip is not None:
        parts = [t.clamp(-clip, clip) for t in parts]
    return parts[0], parts[1], parts[2]


def _norm(x: Tensor, weight: Tensor, head_dim: int, norm: QKNormWeights) -> Tensor:
    parts = x if norm.full else x.unflatten(-1, (-1, head_dim))
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + norm.eps)
    return (parts * scale * weight.float()).view_as(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [heads, D] rotated by one position's cos and sin [R/2]."""
    half = cos.shape[-1]
    low, high = x[:, :half], x[:, half : 2 * half]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, x[:, 2 * half :]), -1)
