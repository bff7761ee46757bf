"""rms_norm: against fp64, and against transformers' own to the bit."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels.rms_norm import rms_norm
from tests.cpu.nearness import assert_near, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (2, 3, 16), (1, 1)])
def test_against_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(dtype)
    before = x.clone()
    with poisoned():
        y = rms_norm(x, weight, 1e-5)
    assert y.dtype is dtype
    assert_near(y, exact(x, weight, 1e-5))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_transformers_to_the_bit(dtype: torch.dtype) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    theirs = Qwen3MoeRMSNorm(48, eps=1e-6).to(dtype)
    theirs.weight.data.normal_()
    x = torch.randn(5, 48).to(dtype)
    assert torch.equal(rms_norm(x, theirs.weight.data, 1e-6), theirs(x))


def test_squares_are_summed_in_fp32() -> None:
    """300 squared is beyond fp16, and in bf16 a sum of many ones stops growing at 256."""
    large = torch.full((1, 64), 300.0, dtype=torch.float16)
    assert_near(rms_norm(large, torch.ones(64, dtype=torch.float16), 1e-5), torch.ones(1, 64))
    many = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(many, torch.ones(4096, dtype=torch.bfloat16), 0.0), many)


def test_eps_keeps_a_row_of_zeros_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))
    assert_near(rms_norm(torch.full((1, 8), 1e-3), torch.ones(8), 1e-6), torch.full((1, 8), 0.5**0.5))


def test_part_of_a_wider_row() -> None:
    wide = torch.randn(4, 3, 50)
    part, weight = wide[..., 10:26], torch.randn(16)
    assert not part.is_contiguous()
    assert_near(rms_norm(part, weight, 1e-5), exact(part, weight, 1e-5))
