"""How near two tensors are: by the norm of their difference, with no mercy for NaN. And memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Of relative Frobenius norm, for a kernel with fp32 sums.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(ours: Tensor, exact: Tensor) -> float:
    """|ours - exact| / |exact| in fp64; both must be finite."""
    a, b = ours.double(), exact.double()
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    assert b.isfinite().all(), "the reference itself is not finite"
    assert a.isfinite().all(), f"{int((~a.isfinite()).sum())} of {a.numel()} values are not finite"
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def assert_near(ours: Tensor, exact: Tensor, limit: float | None = None) -> None:
    """Within `limit`, or within what the dtype of `ours` allows."""
    allowed = LIMITS[ours.dtype] if limit is None else limit
    found = error(ours, exact)
    assert found <= allowed, f"off by {found:.2e}, allowed are {allowed:.0e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch fills memory that nobody initialised (torch.empty and the like) with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def surrounded(x: Tensor) -> Tensor:
    """The same values in the middle of a larger tensor of NaN (or of a number that no index may be)."""
    fill = float("nan") if x.is_floating_point() else 2**30
    around = torch.full((x.shape[0] + 4, *x.shape[1:]), fill, dtype=x.dtype)
    around[2:-2] = x
    return around[2:-2]
