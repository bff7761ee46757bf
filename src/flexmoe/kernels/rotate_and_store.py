"""What happens to a projection's queries, keys and values before attention: the torch reference.

Norm queries and keys, clip, rotate them by their positions, and write keys and values to the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.kernels.decode_attention import QKNormWeights


def rotate_and_store(
    qkv: Tensor,
    cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm: QKNormWeights | None = None,
    clip: float | None = None,
) -> Tensor:
    """qkv [T, (Hq + 2 Hkv) D] -> queries [T, Hq D], ready for attention; writes the rows' places in the cache.

    cache: [slots, 2, Hkv, D]. positions, slots: integers [T]; padding has the slot -1 and is not kept. cos, sin: fp32
    [P, R/2] by position, R <= D rotated dimensions, of which i and i + R/2 are a pair. Everything is computed in fp32
    and rounded once.
    """
    rows, (kv_heads, dim) = len(qkv), cache.shape[2:]
    heads = qkv.float().view(rows, -1, dim)
    query, key, value = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    if norm is not None:
        query, key = _normed(query, norm.query, norm), _normed(key, norm.key, norm)
    if clip is not None:
        query, key, value = (part.clamp(-clip, clip) for part in (query, key, value))
    cos, sin = cos[positions.long()][:, None], sin[positions.long()][:, None]
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    kept = slots >= 0
    cache[slots[kept].long(), 0] = key[kept].to(cache.dtype)
    cache[slots[kept].long(), 1] = value[kept].to(cache.dtype)
    return query.to(qkv.dtype).flatten(1)


def _normed(x: Tensor, weight: Tensor, norm: QKNormWeights) -> Tensor:
    """x [T, heads, D] over each head, or over all of them."""
    over = (1, 2) if norm.full else (2,)
    scale = torch.rsqrt(x.square().mean(over, keepdim=True) + norm.eps)
    return x * scale * (weight.view(x.shape[1:]) if norm.full else weight).float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
