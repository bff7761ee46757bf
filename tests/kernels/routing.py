"""Who chooses which expert: the shapes of routing that kernels for experts must stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.kernels.support import DEVICE


def spread(T: int, E: int, K: int) -> Tensor:
    """K different experts for each of T tokens, all experts alike: int32 [T, K]."""
    return torch.rand(T, E).argsort(-1)[:, :K].to(device=DEVICE, dtype=torch.int32)


def crowded(T: int, E: int, K: int) -> Tensor:
    """All tokens on the same K experts, the last one first; the others get nobody."""
    return torch.arange(E - 1, E - K - 1, -1, dtype=torch.int32, device=DEVICE).repeat(T, 1)


def gaps(T: int, E: int, K: int) -> Tensor:
    """Some choices are not here (-1), and a padded row chose nothing."""
    ids = spread(T, E, K)
    ids[torch.rand(T, K, device=DEVICE) < 0.4] = -1
    ids[T // 2] = -1
    return ids


def filled(counts: Sequence[int]) -> Tensor:
    """One choice for each token, expert e's by counts[e] of them, in some order: int32 [sum of counts, 1]."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ids[torch.randperm(len(ids)), None].to(device=DEVICE, dtype=torch.int32)


def tails(block: int, tail: int) -> list[list[int]]:
    """Counts of rows that leave experts' last blocks of so many rows a tail of any length, or one row too many."""
    full = block + tail
    return [
        [1, 0, tail, block, block + 1, full],
        [full + 1, 0, full + block, 0, full + block + 1, 2 * block],
        [0, 0, 3 * block + 5, 0, 0, 0],  # all tokens on one
        [full],
    ]


ROUTINGS = [spread, crowded, gaps]


def grouped(ids: Tensor, E: int, spare: int = 3) -> tuple[Tensor, Tensor]:
    """rows [E, T + spare] and counts [E] of ids [T, K]; behind the valid rows stands what must not be followed."""
    rows = torch.full((E, ids.shape[0] + spare), 2**30, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(E, dtype=torch.int32, device=DEVICE)
    for expert in range(E):
        chosen = (ids.flatten() == expert).nonzero().flatten()
        rows[expert, : len(chosen)], counts[expert] = chosen.int(), len(chosen)
    return rows, counts
