"""Attention of a batch over the paged KV cache.

Enters: queries [T, Hq, D], the layer's cache [slots, 2, Hkv, D] and, per group of rows, which cache slots hold its
keys. Leaves: [T, Hq, D]. The runner prepares the groups once a step (`layers/forward_batch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows with one query each. keys: a slice when one row's slots are consecutive, else slot numbers [B, L].

    mask: [B, 1, 1, L], False where the padding of shorter rows is; None when all have L keys.
    """

    rows: slice
    keys: slice | Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Consecutive rows of one request. keys: its slots, L of them; the span's queries are the latest of them.

    mask: [n, L], True where a query sees a key; None means plain causal with n == L.
    """

    rows: slice
    keys: slice | Tensor
    mask: Tensor | None


def paged_attention(query: Tensor, cache: Tensor, groups: Sequence[DecodeGroup | PrefillSpan]) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v for every row of `query`, each group over its own keys."""
    out = torch.empty_like(query)
    for group in groups:
        rows = query[group.rows]
        out[group.rows] = (
            _decode(rows, cache, group) if isinstance(group, DecodeGroup) else _prefill(rows, cache, group)
        )
    return out


def _decode(query: Tensor, cache: Tensor, group: DecodeGroup) -> Tensor:
    rows, num_heads, dim = query.shape
    num_kv = cache.shape[2]
    if isinstance(group.keys, slice):
        kv = cache[group.keys][None]  # [1, L, 2, Hkv, D], a view
    else:
        kv = cache.index_select(0, group.keys.view(-1)).view(rows, -1, 2, num_kv, dim)
    key, value = kv.permute(2, 0, 3, 1, 4)  # [B, Hkv, L, D] each
    # The heads that share a key head are laid out as the queries of one attention: no copy of keys per head.
    grouped = query.view(rows, num_kv, num_heads // num_kv, dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=group.mask)
    return out.reshape(rows, num_heads, dim)


def _prefill(query: Tensor, cache: Tensor, group: PrefillSpan) -> Tensor:
    kv = cache[group.keys] if isinstance(group.keys, slice) else cache.index_select(0, group.keys)
    key, value = kv.permute(1, 2, 0, 3)  # [Hkv, L, D] each
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=group.mask,
        is_causal=group.mask is None,
        enable_gqa=query.shape[1] != key.shape[0],
    )
    return out[0].transpose(0, 1)
