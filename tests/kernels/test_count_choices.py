"""Counters of experts' choices, added up on the device, against torch."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels.triton.count_choices import CountTile, count_choices
from tests.kernels.routing import ROUTINGS
from tests.kernels.support import DEVICE


@pytest.mark.parametrize(("T", "E", "K"), [(1, 6, 2), (9, 40, 3), (70, 33, 4)])
@pytest.mark.parametrize("tile", [None, CountTile(16, 16, 1)], ids=["default", "small"])
def test_counts_are_torchs(T: int, E: int, K: int, tile: CountTile | None) -> None:
    """Layers stand further apart than their rows; a padded row and choices of -1 count nowhere; twice adds up."""
    ids = torch.full((len(ROUTINGS), T + 3, K), 0, dtype=torch.int32, device=DEVICE)
    for layer, routing in enumerate(ROUTINGS):
        ids[layer, :T] = routing(T, E, K)
    ids[0, T // 2] = -1
    counts = torch.full((len(ROUTINGS), E), 2**40, dtype=torch.int64, device=DEVICE)
    active = torch.zeros_like(counts)
    for _ in range(2):
        count_choices(ids[:, :T], counts, active, tile=tile)
    for layer in range(len(ROUTINGS)):
        chosen = ids[layer, :T][ids[layer, :T] >= 0].long()
        expected = torch.bincount(chosen, minlength=E)
        assert torch.equal(counts[layer] - 2**40, 2 * expected)
        assert torch.equal(active[layer], 2 * (expected > 0).long())
