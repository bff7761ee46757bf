"""permute: sorted by slot, ties by token, nothing lost, nothing invented; and back again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.moe.permute import permute


@st.composite
def assignments(draw: Any) -> tuple[torch.Tensor, int]:
    """slot_ids [T, K], -1 among them, and the number of slots, some of which nobody may choose."""
    num_slots = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, num_slots - 1), min_size=top_k, max_size=top_k)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=12))), num_slots


@given(assignments())
def test_round_trip(case: tuple[torch.Tensor, int]) -> None:
    slot_ids, num_slots = case
    weights = torch.rand(slot_ids.shape)
    tokens, top_k = slot_ids.shape
    found = permute(slot_ids, weights, num_slots)

    assert len(found.counts) == num_slots
    assert found.counts == [int((slot_ids == slot).sum()) for slot in range(num_slots)]
    # The order is the one of a stable sort of (slot, token, k).
    flat = [(int(slot_ids[t, k]), t, float(weights[t, k])) for t in range(tokens) for k in range(top_k)]
    wanted = sorted([item for item in flat if item[0] >= 0], key=lambda item: item[0])
    slots = [slot for slot, count in enumerate(found.counts) for _ in range(count)]
    assert list(zip(slots, found.rows.tolist(), found.weights.tolist(), strict=True)) == wanted

    # And back: values that say where they come from are summed to their token.
    values = torch.rand(tokens, 3, dtype=torch.float64)
    gathered = values[found.rows] * found.weights[:, None]
    back = torch.zeros_like(values).index_add_(0, found.rows, gathered)
    total = weights.double().where(slot_ids >= 0, 0.0).sum(1, keepdim=True)
    torch.testing.assert_close(back, values * total, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("top_k", [1, 3])
def test_nothing_is_here(top_k: int) -> None:
    found = permute(torch.full((4, top_k), -1), torch.rand(4, top_k), 5)
    assert (found.rows.tolist(), found.weights.tolist(), found.counts) == ([], [], [0] * 5)


def test_all_on_one_slot() -> None:
    weights = torch.rand(6, 1)
    found = permute(torch.full((6, 1), 3), weights, 5)
    assert found.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(found.weights, weights[:, 0])
    assert found.counts == [0, 0, 0, 6, 0]


def test_many_tokens_keep_their_order() -> None:
    """A sort that is not stable shows only on many equal keys."""
    slot_ids = torch.randint(0, 2, (500, 1))
    found = permute(slot_ids, torch.rand(500, 1), 2)
    assert found.rows.tolist() == [t for slot in (0, 1) for t in range(500) if slot_ids[t, 0] == slot]
