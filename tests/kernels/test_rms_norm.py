"""RMS norm of rows, from the residual stream and from rows of the model's dtype."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels import rms_norm as reference
from flexmoe.kernels.triton.rms_norm import rms_norm
from tests.kernels.support import DTYPES, ON_GPU, Guarded, assert_near, normal

SIZES = [(1, 1), (1, 96), (3, 100), (9, 128)] + ([(1, 2048), (7, 4096), (64, 6400)] if ON_GPU else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_of_the_residual_stream(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight, out = normal(rows, hidden, scale=30.0), normal(hidden, dtype=dtype), Guarded(rows, hidden, dtype=dtype)
    rms_norm(x, weight, 1e-5, out.tensor)
    expected = reference.rms_norm(x, weight.float(), 1e-5)
    assert_near(out.check(), expected.to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_models_dtype_rounds_as_the_reference_does(dtype: torch.dtype) -> None:
    x, weight, out = normal(5, 64, dtype=dtype), normal(64, dtype=dtype), Guarded(5, 64, dtype=dtype)
    rms_norm(x, weight, 1e-6, out.tensor)
    expected = reference.rms_norm(x, weight, 1e-6)
    assert_near(out.check(), expected, torch.float32 if dtype is torch.float32 else dtype)


def test_in_place_and_of_spaced_rows() -> None:
    weight = normal(64)
    wide = normal(4, 80)
    expected = reference.rms_norm(wide[:, :64], weight, 1e-6)
    rest = wide[:, 64:].clone()
    rms_norm(wide[:, :64], weight, 1e-6, wide[:, :64])
    assert_near(wide[:, :64], expected, torch.float32)
    assert torch.equal(wide[:, 64:], rest)


def test_a_row_of_zeros_stays_zero() -> None:
    x, out = normal(2, 64), Guarded(2, 64)
    x[0] = 0
    rms_norm(x, normal(64), 1e-6, out.tensor)
    assert torch.equal(out.check()[0], torch.zeros_like(x[0]))
    assert out.tensor[1].isfinite().all()
