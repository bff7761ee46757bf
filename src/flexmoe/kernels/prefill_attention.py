"""Causal attention of prompts over the paged KV cache: how rows are laid out, and the torch reference.

A span is consecutive rows of one request, its latest tokens; their keys are in the cache already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Spans:
    """Which rows are whose, on the device.

    spans: int32 [N, 4]: first row, number of rows, position of the first row, where in `tables` its blocks begin.
    tables: int32, the blocks of each request one after the other. blocks: int32 [B, 2], a span and the first of
    `block_rows` rows in it, together all rows once.
    """

    spans: Tensor
    tables: Tensor
    blocks: Tensor
    block_rows: int
    block_size: int


def prefill_attention(query: Tensor, cache: Tensor, spans: Spans, *, window: int | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v of query [T, Hq D] over the keys of its request up to its position: [T, Hq D].

    cache: [slots, 2, Hkv, D]. window: a query sees so many keys at most, the latest.
    """
    out = torch.empty_like(query)
    heads = query.view(len(query), -1, cache.shape[-1])
    for first, count, position, table in spans.spans.tolist():
        rows = slice(first, first + count)
        places = torch.arange(position + count, device=query.device)
        blocks = spans.tables[table + places // spans.block_size].long()
        key, value = cache[blocks * spans.block_size + places % spans.block_size].permute(1, 2, 0, 3)  # [Hkv, L, D]
        at = places[position:, None]
        seen = places <= at if window is None else (places <= at) & (places > at - window)
        found = F.scaled_dot_product_attention(
            heads[rows].transpose(0, 1)[None], key[None], value[None], attn_mask=seen,
            enable_gqa=heads.shape[1] != key.shape[0],
        )  # fmt: skip
        out[rows] = found[0].transpose(0, 1).flatten(1)
    return out
