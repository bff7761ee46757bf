"""PackedLinear and the Linear layer: the same product in every layout, with and without oneDNN's packing."""

from __future__ import annotations

import logging

import pytest
import torch

from flexmoe.kernels import linear as kernel
from flexmoe.kernels.linear import PackedLinear
from flexmoe.layers.linear import Linear
from tests.cpu.nearness import assert_near, poisoned, surrounded

CPU = torch.device("cpu")


@pytest.fixture(params=["onednn", "plain"])
def _packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(kernel, "_onednn_works", lambda: False)


@pytest.mark.usefixtures("_packing")
@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 32, 64), (3, 7, 33), (16, 1, 5), (17, 70, 16), (32, 33, 8), (65, 7, 20)]
)
def test_against_fp64(rows: int, n: int, k: int, bias: bool, dtype: torch.dtype, prepack: bool) -> None:
    x, weight = surrounded(torch.randn(rows, k).to(dtype)), torch.randn(n, k).to(dtype)
    offset = torch.randn(n).to(dtype) if bias else None
    with poisoned():
        packed = PackedLinear(weight, offset, prepack=prepack)
        y = packed(x)
    wanted = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    assert y.dtype is dtype
    assert_near(y, wanted)
    assert torch.equal(packed(x), y)


@pytest.mark.usefixtures("_packing")
def test_a_weight_that_is_a_view_of_a_larger_one() -> None:
    whole = torch.randn(6, 20, 24, dtype=torch.bfloat16)
    for weight in (whole[2], whole[1, ::2], whole[0, :, 3:11]):
        x = torch.randn(4, weight.shape[1], dtype=torch.bfloat16)
        assert_near(PackedLinear(weight)(x), x.double() @ weight.double().T)


def test_packing_is_used_where_it_pays() -> None:
    if not kernel._onednn_works():
        pytest.skip("this torch has no oneDNN packing")
    half, full = torch.randn(8, 8, dtype=torch.bfloat16), torch.randn(8, 8)
    assert PackedLinear(half)._op is not None
    assert PackedLinear(half, prepack=False)._op is None
    assert PackedLinear(full)._op is None


@pytest.mark.parametrize("failure", [AttributeError, RuntimeError, NotImplementedError, TypeError, None])
def test_a_torch_without_working_packing_is_noticed(
    failure: type[Exception] | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        if failure is not None:
            raise failure("private, and gone")
        return torch.zeros(1, 32, dtype=torch.bfloat16)  # no error, but wrong

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", type("Op", (), {"default": staticmethod(broken)}))
    with caplog.at_level(logging.INFO):
        assert not kernel._onednn_works.__wrapped__()
    assert "oneDNN weight packing is not available" in caplog.text


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prepack", [True, False])
def test_the_layer_hands_its_weight_over(bias: bool, prepack: bool) -> None:
    layer = Linear(6, 5, bias=bias, dtype=torch.bfloat16, device=CPU)
    assert layer.weight is not None
    for parameter in layer.parameters():
        parameter.data.normal_()
    weight, x = layer.weight.data.double(), torch.randn(3, 6, dtype=torch.bfloat16)
    wanted = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
    with pytest.raises(AssertionError, match=r"pack\(\) was not called"):
        layer(x)
    layer.pack(prepack=prepack)
    assert_near(layer(x), wanted)
    assert (layer.weight is None) == prepack, "two copies of the weight, or none"
    assert not any(parameter.requires_grad for parameter in layer.parameters())
