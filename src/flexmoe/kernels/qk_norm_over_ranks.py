"""Norm of queries and keys over all heads of a token, of which each rank holds some: the torch reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmoe.kernels.decode_attention import QKNormWeights


def qk_norm_over_ranks(parts: Sequence[Tensor], norms: Sequence[QKNormWeights]) -> list[Tensor]:
    """Of all ranks: rows [T, q + 2 kv], and weights of its q and kv columns -> the rows, queries and keys normed.

    Keys that several ranks hold count as often among the squares as among the columns. The mean is taken in fp32; a
    row is rounded to its dtype before the product with the weight.
    """
    found = [part.clone() for part in parts]
    start = 0
    for name in ("query", "key"):
        weights = [getattr(norm, name) for norm in norms]
        columns = slice(start, start + len(weights[0]))
        squares = torch.stack([part[:, columns].float().square().sum(-1) for part in parts]).sum(0)  # [T]
        scale = torch.rsqrt(squares / (len(parts) * len(weights[0])) + norms[0].eps)[:, None]
        for out, part, weight in zip(found, parts, weights, strict=True):
            out[:, columns] = (part[:, columns].float() * scale).to(part.dtype) * weight
        start = columns.stop
    return found
