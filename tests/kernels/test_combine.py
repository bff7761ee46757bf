"""The sum over a token's experts, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import combine as reference
from flexmoe.kernels.rms_norm import rms_norm
from flexmoe.kernels.triton.combine import CombineTile, combine, combine_norm
from tests.kernels.support import DEVICE, DTYPES, Guarded, assert_near, normal

SHAPES = [(1, 1, 64), (1, 2, 128), (5, 3, 100), (9, 8, 96), (70, 2, 40)]


def _ids(T: int, K: int) -> Tensor:
    return torch.randint(0, 4, (T, K), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [None, CombineTile(block_h=32, num_warps=2)])
@pytest.mark.parametrize(("T", "K", "H"), SHAPES)
def test_writes_the_sum(T: int, K: int, H: int, tile: CombineTile | None, dtype: torch.dtype) -> None:
    y, ids, out, again = (
        normal(T * K, H, dtype=dtype),
        _ids(T, K),
        Guarded(T, H, dtype=dtype),
        normal(T, H, dtype=dtype),
    )
    combine(y, ids, out.tensor, accumulate=False, tile=tile)
    assert_near(out.check(), reference.combine(y, ids), dtype)
    combine(y, ids, again, accumulate=False, tile=tile)
    assert torch.equal(out.tensor, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "H"), SHAPES)
def test_adds_to_the_residual_stream(T: int, K: int, H: int, dtype: torch.dtype) -> None:
    y, ids, before, out = normal(T * K, H, dtype=dtype), _ids(T, K), normal(T, H), Guarded(T, H)
    out.tensor.copy_(before)
    combine(y, ids, out.tensor, accumulate=True)
    assert_near(out.check(), before + reference.combine(y, ids), torch.float32)


@pytest.mark.parametrize("accumulate", [True, False])
def test_rows_without_an_expert_are_never_read(accumulate: bool) -> None:
    y, ids, before, out = normal(12, 48), _ids(4, 3), normal(4, 48), Guarded(4, 48)
    ids[1] = -1
    ids[3, 1] = -1
    y[3:6] = torch.nan
    y[10] = torch.nan
    if accumulate:
        out.tensor.copy_(before)
    combine(y, ids.long(), out.tensor, accumulate=accumulate)
    expected = reference.combine(y, ids)
    assert_near(out.check(), expected + before if accumulate else expected, torch.float32)
    assert accumulate or not out.tensor[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "H"), SHAPES)
def test_norms_what_it_added(T: int, K: int, H: int, dtype: torch.dtype) -> None:
    y, ids, before, weight = normal(T * K, H, dtype=dtype), _ids(T, K), normal(T, H), normal(H, dtype=dtype)
    ids[0] = -1
    y[:K] = torch.nan
    x, normed, again = Guarded(T, H), Guarded(T, H, dtype=dtype), normal(T, H, dtype=dtype)
    x.tensor.copy_(before)
    combine_norm(y, ids, x.tensor, weight, 1e-5, normed.tensor)
    expected = before + reference.combine(y, ids)
    assert_near(x.check(), expected, torch.float32)
    assert_near(normed.check(), rms_norm(expected, weight.float(), 1e-5), dtype)
    combine_norm(y, ids, before, weight, 1e-5, again)
    assert torch.equal(before, x.tensor)
    assert torch.equal(again, normed.tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "H"), [(1, 1, 64), (5, 3, 100)])
def test_every_row_counts_without_ids(T: int, K: int, H: int, dtype: torch.dtype) -> None:
    y, before, weight = normal(T * K, H, dtype=dtype), normal(T, H), normal(H, dtype=dtype)
    x, normed = Guarded(T, H), Guarded(T, H, dtype=dtype)
    x.tensor.copy_(before)
    combine_norm(y, None, x.tensor, weight, 1e-5, normed.tensor)
    expected = before + y.view(T, K, H).float().sum(1)
    assert_near(x.check(), expected, torch.float32)
    assert_near(normed.check(), rms_norm(expected, weight.float(), 1e-5), dtype)
