"""The K best experts: the kernel, and its device functions inlined in another kernel, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels import topk as reference
from flexmoe.kernels.triton.topk import select_expert, select_experts, topk
from tests.kernels.support import DEVICE, ON_GPU, Guarded, normal

# numpy in Triton's interpreter: of a range whose end is known at run time only, and of NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

WAYS = ("topk", "select_expert", "select_experts")  # the latter two for at most 256 experts
SHAPES = [(2, 1), (6, 2), (8, 2), (20, 8), (64, 8), (128, 8), (200, 3), (512, 10), (1000, 16)]


@triton.jit
def _one_choice(logits_ptr, ids_ptr, weights_ptr, E, BLOCK_E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr):
    row, k = tl.program_id(0), tl.program_id(1)
    expert, weight = select_expert(logits_ptr + row * E, E, BLOCK_E, K, k, RENORMALIZE)
    tl.store(ids_ptr + row * K + k, expert)
    tl.store(weights_ptr + row * K + k, weight)


@triton.jit
def _all_choices(
    logits_ptr, ids_ptr, weights_ptr, E, BLOCK_E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr
):
    row = tl.program_id(0)
    experts, weights = select_experts(logits_ptr + row * E, E, BLOCK_E, K, RENORMALIZE)
    for k in tl.static_range(K):
        tl.store(ids_ptr + row * K + k, experts[k])
        tl.store(weights_ptr + row * K + k, weights[k])


def _run(way: str, logits: Tensor, K: int, renormalize: bool, warps: int = 4) -> tuple[Tensor, Tensor]:
    (T, E), ids, weights = logits.shape, _unwritten_ids(logits.shape[0], K), Guarded(logits.shape[0], K)
    if way == "topk":
        topk(logits, ids[:T], weights.tensor, renormalize=renormalize)
    else:
        kernel: Any = _one_choice if way == "select_expert" else _all_choices
        grid = (T, K) if way == "select_expert" else (T,)
        block = triton.next_power_of_2(E)
        kernel[grid](logits, ids, weights.tensor, E, BLOCK_E=block, K=K, RENORMALIZE=renormalize, num_warps=warps)
    assert (ids[T:] == -7).all(), "written past the end"
    return ids[:T], weights.check()


def _unwritten_ids(rows: int, K: int) -> Tensor:
    return torch.full((rows + 2, K), -7, dtype=torch.int32, device=DEVICE)


def _distinct(T: int, E: int) -> Tensor:
    """Rows of logits whose gaps are far above rounding, in random order, with a random scale."""
    rows = torch.stack([torch.randperm(E) for _ in range(T)]).float()
    return (rows * (torch.rand(T, 1) * 0.2 + 0.01) - 3).to(DEVICE)


@pytest.mark.parametrize(("way", "E", "K"), [(way, E, K) for E, K in SHAPES for way in WAYS[: 3 if E <= 256 else 1]])
@pytest.mark.parametrize("renormalize", [True, False])
def test_chooses_as_torch_does(way: str, E: int, K: int, renormalize: bool) -> None:
    logits = _distinct(5 if ON_GPU else 2, E)
    ids, weights = _run(way, logits, K, renormalize)
    expected_ids, expected_weights = reference.topk(logits, K, renormalize=renormalize)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("way", WAYS)
def test_ties_go_to_the_lower_expert(way: str) -> None:
    logits = torch.stack([torch.zeros(40), normal(40).cpu().round(), torch.arange(40) // 4 * 1.0]).to(DEVICE)
    logits[1, ::7] = 30.0  # and here all others underflow or nearly so
    logits[2, 5:] -= 300.0
    ids, weights = _run(way, logits, 8, True)
    expected_ids, expected_weights = reference.topk(logits, 8, renormalize=True)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -torch.nan])
@pytest.mark.parametrize("E", [6, 64, 100])
def test_a_bad_row_chooses_within_bounds_and_spoils_no_other(way: str, bad: float, E: int) -> None:
    logits = _distinct(3, E)
    logits[0] = bad
    logits[1, 3] = bad
    ids, weights = _run(way, logits, 4, True)
    assert ((ids >= 0) & (ids < E)).all()
    assert all(len(set(row)) == 4 for row in ids.tolist())
    expected_ids, expected_weights = reference.topk(logits[2:], 4, renormalize=True)
    assert torch.equal(ids[2:], expected_ids)
    torch.testing.assert_close(weights[2:], expected_weights)
    assert weights[0].isnan().all()


@pytest.mark.parametrize("warps", [1, 2, 8])
def test_every_number_of_warps_chooses_alike(warps: int) -> None:
    logits = normal(2, 128)
    for way in ("select_expert", "select_experts"):
        ids, weights = _run(way, logits, 4, False, warps)
        same_ids, same_weights = _run(way, logits, 4, False)
        assert torch.equal(ids, same_ids)
        assert torch.equal(weights, same_weights)


def test_padding_rows_choose_nothing() -> None:
    logits, lengths = normal(4, 8), torch.tensor([3, 0, 1, 0], dtype=torch.int32, device=DEVICE)
    logits[1] = torch.nan
    ids, weights = _unwritten_ids(4, 2), Guarded(4, 2)
    topk(logits, ids[:4], weights.tensor, renormalize=True, lengths=lengths)
    expected_ids, expected_weights = reference.topk(logits, 2, renormalize=True, lengths=lengths)
    assert torch.equal(ids[:4], expected_ids)
    torch.testing.assert_close(weights.check(), expected_weights)


def test_logits_may_be_a_slice_of_wider_rows() -> None:
    logits = normal(3, 20)[:, :6]
    ids, weights = _unwritten_ids(3, 2), Guarded(3, 2)
    topk(logits, ids[:3], weights.tensor, renormalize=False)
    assert torch.equal(ids[:3], reference.topk(logits, 2, renormalize=False)[0])


@pytest.mark.parametrize(("E", "K"), [(4, 5), (1025, 2), (64, 17)])
def test_refuses_what_it_cannot_choose(E: int, K: int) -> None:
    with pytest.raises(ValueError, match=f"top {K} of {E}"):
        topk(normal(1, E), _unwritten_ids(1, K), normal(1, K), renormalize=True)
