"""Rows beside those of the same slot, against an index."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels import group_by_expert as reference
from flexmoe.kernels.triton.copy_by_expert import copy_by_expert
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from tests.kernels.support import DEVICE


@pytest.mark.parametrize("absent", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("T", "K", "slots", "H"), [(1, 1, 2, 64), (5, 2, 8, 72), (37, 3, 5, 16), (9, 8, 20, 1096)])
def test_rows_stand_in_the_order_of_slots(T: int, K: int, slots: int, H: int, absent: float) -> None:
    """What has no slot leaves the last rows alone."""
    ids = torch.stack([torch.randperm(slots)[:K] for _ in range(T)]).to(DEVICE, torch.int32)
    ids[torch.rand(T, K, device=DEVICE) < absent] = -1
    x, out = torch.randn(T, H, device=DEVICE), torch.full((T * K + 1, H), torch.nan, device=DEVICE)
    rows = torch.full((slots, T), -7, dtype=torch.int32, device=DEVICE)
    counts = torch.empty(slots, dtype=torch.int32, device=DEVICE)
    group_by_expert(ids, slots, rows, counts)
    copy_by_expert(x, rows, counts, out[:-1], top_k=K)
    lists, _ = reference.group_by_expert(ids, slots)
    expected = x[torch.cat(lists).long() // K]
    assert torch.equal(out[: len(expected)], expected)
    assert out[len(expected) :].isnan().all()
