"""The most likely token where ranks share the vocabulary: each finds its best, and all agree on the winner."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels.triton import argmax
from tests.kernels.support import DEVICE


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_winner_is_that_of_whole_rows(ranks: int) -> None:
    """Ties go to the lower token, across ranks, too; NaN anywhere gives -1."""
    T, V = 5, 50
    logits = torch.randn(T, V, device=DEVICE)
    logits[1, [3, 20, 49]] = 9.0
    logits[2, [20, 49]] = 9.0
    logits[3, 30] = torch.nan
    logits[4] = -torch.inf
    width = -(-V // ranks)
    scratch = torch.empty(argmax.scratch_words(T, V), dtype=torch.int64, device=DEVICE)
    found = torch.zeros(ranks, T, dtype=torch.int64, device=DEVICE)
    for rank in range(ranks):
        argmax.best(logits[:, rank * width : (rank + 1) * width], found[rank], scratch, first=rank * width)
    tokens, expected = (torch.zeros(T, dtype=torch.int64, device=DEVICE) for _ in range(2))
    argmax.winner(found, tokens)
    argmax.greedy(logits, expected, scratch)
    assert tokens.tolist() == expected.tolist()
    assert tokens.tolist()[1:4] == [3, 20, -1]
