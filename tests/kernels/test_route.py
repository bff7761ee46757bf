"""Norm and router product, in one launch and in two, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import route as reference
from flexmoe.kernels.triton.route import RouteTile, default_tile, norms_first, route
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, Guarded, assert_near, distance, normal

# numpy in Triton's interpreter: of a range whose end is known at run time only, and of inf - inf.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

EPS = 1e-5
FEW = RouteTile(block_t=1, block_e=2, block_k=0, num_warps=8, num_stages=1)
MANY = RouteTile(block_t=16, block_e=16, block_k=32, num_warps=2, num_stages=2)
SHAPES = [(1, 64, 8), (1, 100, 2), (2, 128, 6), (3, 80, 7), (7, 66, 20), (17, 64, 17)]
if ON_GPU:
    SHAPES += [(1, 4096, 8), (1, 2048, 128), (8, 2048, 64), (5, 2880, 33), (2, 8192, 512), (130, 2048, 128)]


def _inputs(T: int, H: int, E: int, dtype: torch.dtype, router: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return normal(T, H, scale=3.0), normal(H, dtype=dtype), normal(E, H, scale=H**-0.5).to(router)


def _check(x: Tensor, norm_weight: Tensor, router_weight: Tensor, tile: RouteTile | None) -> None:
    T, H, E, dtype = *x.shape, router_weight.shape[0], norm_weight.dtype
    normed, logits = Guarded(T, H, dtype=dtype), Guarded(T, E)
    route(x, norm_weight, EPS, router_weight, normed.tensor, logits.tensor, tile=tile)
    expected, _ = reference.route(x, norm_weight, EPS, router_weight)
    assert_near(normed.check(), expected, dtype)
    # The product is compared for the rows as the kernel rounded them, in fp64: it must be exact to fp32.
    product = normed.tensor.double() @ router_weight.double().T
    assert distance(logits.check(), product) < 2e-6
    again = torch.empty_like(normed.tensor), torch.empty_like(logits.tensor)
    route(x, norm_weight, EPS, router_weight, *again, tile=tile)
    assert torch.equal(again[0], normed.tensor)
    assert torch.equal(again[1], logits.tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [None, FEW, MANY])
@pytest.mark.parametrize(("T", "H", "E"), SHAPES)
def test_norms_and_multiplies(T: int, H: int, E: int, tile: RouteTile | None, dtype: torch.dtype) -> None:
    for router in {torch.float32, dtype}:
        _check(*_inputs(T, H, E, dtype, router), tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [FEW, MANY])
def test_rows_that_are_normed_already(tile: RouteTile, dtype: torch.dtype) -> None:
    x, norm_weight, weight = _inputs(9, 128, 6, dtype, dtype)
    assert norms_first(tile) == (tile is MANY)
    normed, logits, again = normal(9, 128, dtype=dtype), Guarded(9, 6), Guarded(9, 6)
    route(x, norm_weight, EPS, weight, normed, logits.tensor, tile=tile)
    x.fill_(torch.nan)  # is not looked at
    kept = normed.clone()
    route(x, norm_weight, EPS, weight, normed, again.tensor, is_normed=True, tile=tile)
    assert torch.equal(again.check(), logits.check())
    assert torch.equal(normed, kept)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has fp32 only")
@pytest.mark.parametrize("tile", [FEW, MANY])
def test_router_in_the_other_short_dtype(tile: RouteTile) -> None:
    _check(*_inputs(20, 256, 12, torch.float16, torch.bfloat16), tile)
    _check(*_inputs(20, 256, 12, torch.bfloat16, torch.float16), tile)


@pytest.mark.skipif(not ON_GPU, reason="too much for the interpreter")
@pytest.mark.parametrize("T", [64, 257, 600, 4096])
@pytest.mark.parametrize("E", [8, 128])
@pytest.mark.parametrize("router", [torch.bfloat16, torch.float32])
def test_prefill(T: int, E: int, router: torch.dtype) -> None:
    _check(*_inputs(T, 2048, E, torch.bfloat16, router), None)


@pytest.mark.parametrize("tile", [FEW, MANY])
def test_a_bad_row_spoils_no_other(tile: RouteTile) -> None:
    x, norm_weight, weight = _inputs(5, 64, 6, torch.float32, torch.float32)
    x[2] = torch.inf
    normed, logits = Guarded(5, 64), Guarded(5, 6)
    route(x, norm_weight, EPS, weight, normed.tensor, logits.tensor, tile=tile)
    good = torch.tensor([0, 1, 3, 4], device=DEVICE)
    expected_normed, expected_logits = reference.route(x[good], norm_weight, EPS, weight)
    assert_near(normed.check()[good], expected_normed, torch.float32)
    assert_near(logits.check()[good], expected_logits, torch.float32)


@pytest.mark.parametrize(("H", "E"), [(4096, 8), (2048, 128), (2048, 64), (1024, 6), (8192, 512), (64, 2)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_default_tiles_fit(H: int, E: int, itemsize: int) -> None:
    for T in (1, 2, 8, 9, 64, 128, 256, 8192):
        tile = default_tile(T, H, E, itemsize)
        if tile.block_t == 1:
            assert tile.block_e * H <= max(H, 8192)
        else:
            assert min(tile.block_t, tile.block_e) >= 16
            assert (tile.block_t + tile.block_e) * tile.block_k * itemsize * tile.num_stages <= 160 << 10
