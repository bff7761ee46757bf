"""What every kernel test shares: where it runs, in which dtypes, how near is near enough, and poisoned memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# On a GPU the compiled kernels; elsewhere Triton's interpreter (tests/conftest.py), whose bf16 is wrong and fp16 slow.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if ON_GPU else (torch.float32,)

# Relative Frobenius distance that rounding explains.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

_CANARY = 12345.0


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Fresh normal numbers on DEVICE; never zeros, which hide wrong indexing."""
    return (torch.randn(shape, dtype=torch.float32) * scale).to(device=DEVICE, dtype=dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output full of NaN, so that an element nobody wrote is seen."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


class Guarded:
    """A poisoned output [rows, ...] with canary rows behind it: `check()` fails if a kernel wrote past the end."""

    def __init__(self, rows: int, *rest: int, dtype: torch.dtype = torch.float32, canaries: int = 4) -> None:
        self._whole = torch.full((rows + canaries, *rest), _CANARY, dtype=dtype, device=DEVICE)
        self._canary = self._whole[rows:].clone()
        self.tensor = self._whole[:rows]
        self.tensor.fill_(torch.nan)

    def check(self) -> Tensor:
        """The output, once the rows behind it are known to be untouched."""
        assert torch.equal(self._whole[self.tensor.shape[0] :], self._canary), "written past the end"
        return self.tensor


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; NaN never passes a comparison with it."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Fail unless `found` is as near to `expected` as rounding to `dtype` allows."""
    assert found.shape == expected.shape
    apart = distance(found, expected)
    assert apart < TOLERANCE[dtype], f"relative distance {apart:.2e} in {dtype}"


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Torch operations that wait for the GPU raise in here."""
    with warnings.catch_warnings():  # that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
