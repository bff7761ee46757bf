"""The first rows of a decode step: embeddings of tokens, some of which only the device knows yet, in plain torch.

Enters: token ids, and for each row whether it takes a sampled one instead. Leaves: the ids and their embeddings.
`kernels/triton/embed.py` is tested against this.
"""

from __future__ import annotations

import torch
from torch import Tensor


def embed(token_ids: Tensor, sources: Tensor, sampled: Tensor, table: Tensor, out: Tensor, chosen: Tensor) -> None:
    """chosen[t] = sampled[sources[t]] if sources[t] >= 0 else token_ids[t]; out[t] = table[chosen[t]] in fp32.

    token_ids: int64 [T]. sources: int32 [T]. sampled: int64, one-dimensional. table: [V, H]. out: fp32 [T, H].
    chosen: int64 [T]. A sampled -1, no token, counts as 0.
    """
    taken = sampled.reshape(-1)[sources.clamp(min=0).long()]
    chosen.copy_(torch.where(sources >= 0, taken, token_ids).clamp(min=0))
    out.copy_(table[chosen])
