"""swiglu: silu(gate) * up with the gate in the first half, against fp64."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels.swiglu import swiglu
from tests.cpu.nearness import assert_near, poisoned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (5, 74), (2, 3, 16)])
def test_against_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape) * 4).to(dtype)
    before = gate_up.clone()
    with poisoned():
        out = swiglu(gate_up)
    gate, up = gate_up.double().chunk(2, -1)
    assert out.dtype is dtype
    assert_near(out, gate / (1 + (-gate).exp()) * up)
    assert torch.equal(gate_up, before)


def test_large_values_saturate() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 2.0, 2.0]])
    assert torch.equal(swiglu(gate_up), torch.tensor([[-0.0, 2e4, 0.0]]))


def test_part_of_a_wider_row() -> None:
    wide = torch.randn(4, 20)
    assert torch.equal(swiglu(wide[:, 3:13]), swiglu(wide[:, 3:13].contiguous()))
