"""Steps of prompts through the kernels for Hopper are those through Triton's but for rounding, where they serve."""

from __future__ import annotations

import pytest
import torch

from flexmoe.models.hopper import HopperKernels, hopper_kernels
from tests.gpu.hopper import NEEDS_HOPPER
from tests.gpu.hopper_prompts import DEVICE, MODEL, Steps

pytestmark = NEEDS_HOPPER
LENGTHS = (300, 1, 129, 700)
WHOLE = [LENGTHS]
PARTS = [(128, 0, 100, 333), (300, 1, 128, 334), (300, 1, 129, 700)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cuts", [WHOLE, PARTS], ids=["whole", "parts"])
def test_logits_are_those_through_triton(cuts: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    steps = Steps.of(LENGTHS, dtype)
    expected = steps.logits(cuts, HopperKernels()).float()
    caches = [layer.clone() for layer in steps.cache.layers]
    for layer in steps.cache.layers:
        layer.fill_(torch.nan)
    found = steps.logits(cuts, None).float()
    assert found.isfinite().all()
    assert float((found - expected).norm() / expected.norm()) < 0.03
    for layer, before in zip(steps.cache.layers, caches, strict=True):
        assert torch.equal(layer.isnan(), before.isnan())


def test_this_model_is_served() -> None:
    kernels = hopper_kernels(DEVICE, MODEL, torch.bfloat16)
    assert kernels.attention is not None
    assert kernels.products is not None


def test_no_kernel_serves_fp32() -> None:
    assert hopper_kernels(DEVICE, MODEL, torch.float32) == HopperKernels()
