"""The list of assignments of each slot, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import group_by_expert as reference
from flexmoe.kernels.triton.group_by_expert import GroupByExpertTile, default_tile, group_by_expert
from flexmoe.kernels.triton.topk import topk
from flexmoe.kernels.triton.topk_by_expert import TopkByExpertTile, topk_by_expert
from tests.kernels.support import DEVICE, ON_GPU, Guarded, normal

# numpy in Triton's interpreter: of a range whose end is known at run time only, and of NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

UNWRITTEN = -7
SMALL = GroupByExpertTile(block_t=16, num_warps=1)


def _routed(T: int, K: int, slots: int) -> Tensor:
    return torch.stack([torch.randperm(slots)[:K] for _ in range(T)]).to(DEVICE, torch.int32)


def _check(ids: Tensor, slots: int, *, extra: int = 0, tile: GroupByExpertTile | None = None) -> None:
    capacity = ids.shape[0] + extra
    rows = torch.full((slots + 1, capacity), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    counts = torch.full((slots + 1,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    group_by_expert(ids, slots, rows[:slots], counts[:slots], tile=tile)
    lists, expected_counts = reference.group_by_expert(ids, slots)
    assert torch.equal(counts[:slots], expected_counts)
    expected = torch.full_like(rows, UNWRITTEN)
    for slot, assignments in enumerate(lists):
        expected[slot, : len(assignments)] = assignments
    assert torch.equal(rows, expected)
    assert counts[slots] == UNWRITTEN


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tile", [None, SMALL])
@pytest.mark.parametrize(("T", "K", "slots"), [(1, 1, 2), (1, 2, 8), (5, 2, 6), (9, 8, 20), (33, 3, 4), (100, 2, 3)])
def test_lists_every_assignment_in_order(
    T: int, K: int, slots: int, tile: GroupByExpertTile | None, dtype: torch.dtype
) -> None:
    _check(_routed(T, K, slots).to(dtype), slots, tile=tile, extra=3)


def test_all_tokens_on_one_expert() -> None:
    _check(torch.full((70, 1), 2, dtype=torch.int32, device=DEVICE), 4, tile=SMALL)


def test_padding_and_absent_choices_are_in_no_list() -> None:
    ids = _routed(40, 2, 5)
    ids[7:19] = -1
    ids[30, 1] = -1
    _check(ids, 5, tile=SMALL)
    _check(torch.full((6, 2), -1, dtype=torch.int32, device=DEVICE), 3)


def test_choices_beyond_the_slots_are_in_no_list() -> None:
    _check(_routed(12, 4, 9), 5, tile=SMALL)


def test_drops_what_exceeds_the_capacity() -> None:
    ids = torch.zeros(9, 1, dtype=torch.int32, device=DEVICE)
    rows = torch.full((2, 4), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    group_by_expert(ids, 2, rows, counts)
    assert rows.tolist() == [[0, 1, 2, 3], [UNWRITTEN] * 4]
    assert counts.tolist() == [4, 0]


@pytest.mark.parametrize("T", [600, 3000] if not ON_GPU else [1024, 16384])
def test_many_tokens(T: int) -> None:
    assert default_tile(T, 8).block_t <= 1024
    _check(_routed(T, 8, 16), 16)


def _check_one_launch(
    logits: Tensor, K: int, lengths: Tensor | None, renormalize: bool, tile: TopkByExpertTile | None
) -> None:
    """What two launches give: the same choices; weights but for the order of the sum they are divided by."""
    (T, E), by_two, by_one = logits.shape, [], []
    for results in (by_two, by_one):
        ids = torch.full((T + 1, K), UNWRITTEN, dtype=torch.int32, device=DEVICE)
        rows = torch.full((E + 1, T + 2), UNWRITTEN, dtype=torch.int32, device=DEVICE)
        counts = torch.full((E + 1,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
        weights = Guarded(T, K)
        if results is by_two:
            topk(logits, ids[:T], weights.tensor, renormalize=renormalize, lengths=lengths)
            group_by_expert(ids[:T], E, rows[:E], counts[:E])
        else:
            topk_by_expert(
                logits,
                ids[:T],
                weights.tensor,
                rows[:E],
                counts[:E],
                renormalize=renormalize,
                lengths=lengths,
                tile=tile,
            )
        results.extend((ids, rows, counts, weights.check().nan_to_num(-1.0)))
    assert all(torch.equal(one, two) for one, two in zip(by_one[:3], by_two[:3], strict=True))
    torch.testing.assert_close(by_one[3], by_two[3])


@pytest.mark.parametrize("tile", [None, TopkByExpertTile(block_t=2, num_warps=2)])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 2, 1), (3, 6, 2), (9, 8, 2), (5, 20, 8), (3, 70, 4)])
def test_one_launch_gives_what_two_give(
    T: int, E: int, K: int, renormalize: bool, tile: TopkByExpertTile | None
) -> None:
    logits = normal(T, E)
    logits[0] = logits[0].round()  # ties
    lengths = torch.randint(0, 3, (T,), dtype=torch.int32, device=DEVICE)
    _check_one_launch(logits, K, None, renormalize, tile)
    _check_one_launch(logits, K, lengths, renormalize, tile)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_launch_agrees_with_two_on_bad_rows(bad: float) -> None:
    logits = normal(4, 12)
    logits[1] = bad
    logits[2, 5] = bad
    _check_one_launch(logits, 3, None, True, None)


@pytest.mark.skipif(not ON_GPU, reason="too much for the interpreter")
@pytest.mark.parametrize(("T", "E", "K"), [(32, 128, 8), (128, 128, 8), (256, 64, 8), (128, 8, 2), (33, 256, 10)])
def test_one_launch_gives_what_two_give_for_large_batches(T: int, E: int, K: int) -> None:
    _check_one_launch(normal(T, E), K, None, True, None)
    _check_one_launch((normal(T, E) * 4).round(), K, None, False, None)
