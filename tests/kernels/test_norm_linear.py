"""Norm, linear map, bias and residual in one: every tile against plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import norm_linear as reference
from flexmoe.kernels.rms_norm import rms_norm
from flexmoe.kernels.triton.norm_linear import (
    DirectTile,
    DotTile,
    GemvTile,
    NormAfter,
    Tile,
    default_tile,
    norm_linear,
    norms_after,
    scratch_bytes,
)
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, Guarded, assert_near, normal

EPS = 1e-5


@dataclass(frozen=True)
class Inputs:
    """What a projection takes; out_before is what it adds to, or None."""

    x: Tensor
    weight: Tensor
    norm_weight: Tensor | None
    bias: Tensor | None
    out_before: Tensor | None
    out_dtype: torch.dtype

    def run(self, tile: Tile | None, *, pdl: bool = False) -> Tensor:
        """The kernel's result, in guarded memory and with poisoned scratch."""
        rows, k = self.x.shape
        n = self.weight.shape[0]
        out = Guarded(rows, n, dtype=self.out_dtype)
        if self.out_before is not None:
            out.tensor.copy_(self.out_before)
        norm = self.norm_weight is not None
        size = scratch_bytes(rows, n, k, self.weight.dtype, norm=norm, tile=tile)
        scratch = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)  # NaN in every dtype
        residual = self.out_before is not None
        norm_linear(
            self.x, self.weight, out.tensor, norm_weight=self.norm_weight, eps=EPS, bias=self.bias, residual=residual,
            scratch=scratch if size else None, tile=tile, pdl=pdl,
        )  # fmt: skip
        return out.check()

    def expected(self) -> Tensor:
        out = torch.zeros(self.x.shape[0], self.weight.shape[0], dtype=self.out_dtype, device=DEVICE)
        if self.out_before is not None:
            out.copy_(self.out_before)
        residual = self.out_before is not None
        reference.norm_linear(
            self.x, self.weight, out, norm_weight=self.norm_weight, eps=EPS, bias=self.bias, residual=residual
        )
        return out


def plain(rows: int, n: int, k: int, dtype: torch.dtype) -> Inputs:
    """As an output projection without residual: from the model's dtype to the model's dtype."""
    return Inputs(normal(rows, k, dtype=dtype), normal(n, k, dtype=dtype), None, None, None, dtype)


def full(rows: int, n: int, k: int, dtype: torch.dtype) -> Inputs:
    """All at once: norm of the residual stream, bias, and into the residual stream."""
    return Inputs(
        normal(rows, k, scale=3.0), normal(n, k, dtype=dtype), normal(k, dtype=dtype), normal(n, dtype=dtype),
        normal(rows, n), torch.float32,
    )  # fmt: skip


GEMV = [
    GemvTile(),
    GemvTile(lanes=1, warps_n=2, warps_k=2, rows=1, ahead=1, x_ahead=1),
    GemvTile(lanes=8, warps_n=1, warps_k=1, rows=2, ahead=2, x_ahead=3),
]
DIRECT = [
    DirectTile(),
    DirectTile(warps_n=2, warps_k=1, rows=2, ahead=2, x_ahead=1, chains=1),
    DirectTile(warps_n=1, warps_k=2, ahead=1, x_ahead=2, chains=3, fuse_norm=False),
]
DOT = [
    DotTile(block_t=16, block_n=32, block_k=32, num_stages=2),
    DotTile(block_t=32, block_n=16, block_k=16, splits=3, num_stages=3),
]
TILES: list[Tile] = [*GEMV, *DIRECT, *DOT]


def cases() -> list[tuple[torch.dtype, Tile]]:
    # On tensor cores fp32 would become tf32; the interpreter computes what is asked for, in any dtype but slowly.
    some = [(dtype, tile) for dtype in DTYPES for tile in TILES]
    return [(dtype, tile) for dtype, tile in some if not (ON_GPU and dtype is torch.float32 and tile in DIRECT)]


@pytest.mark.parametrize(("dtype", "tile"), cases())
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 33, 128), (3, 8, 96), (7, 18, 104)])
@pytest.mark.parametrize("make", [plain, full])
def test_equals_the_reference(make, rows: int, n: int, k: int, dtype: torch.dtype, tile: Tile) -> None:
    inputs = make(rows, n, k, dtype)
    found = inputs.run(tile)
    assert_near(found, inputs.expected(), dtype)
    assert torch.equal(found, inputs.run(tile))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 33, 96), (5, 64, 128), (35, 72, 96)])
def test_norms_the_rows_that_come_out(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    tile = DOT[1]
    assert [norms_after(some) for some in (*GEMV, *DIRECT, DOT[0], tile)] == [False] * 7 + [True]
    x, weight, before = normal(rows, k, dtype=dtype), normal(n, k, dtype=dtype, scale=k**-0.5), normal(rows, n)
    bias, norm_weight = normal(n, dtype=dtype), normal(n, dtype=dtype)
    scratch = torch.full(
        (scratch_bytes(rows, n, k, dtype, norm=False, tile=tile),), 255, dtype=torch.uint8, device=DEVICE
    )
    plain_out, out, normed = before.clone(), Guarded(rows, n), Guarded(rows, n, dtype=dtype)
    out.tensor.copy_(before)
    norm_linear(x, weight, plain_out, bias=bias, residual=True, scratch=scratch, tile=tile)
    after = NormAfter(norm_weight, EPS, normed.tensor)
    norm_linear(x, weight, out.tensor, bias=bias, residual=True, after=after, scratch=scratch, tile=tile)
    assert torch.equal(out.check(), plain_out)
    assert_near(normed.check(), rms_norm(plain_out, norm_weight.float(), EPS), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [DIRECT[1], DOT[0], DOT[1]])
def test_more_rows_than_a_gemv_takes(tile: Tile, dtype: torch.dtype) -> None:
    if ON_GPU and dtype is torch.float32 and isinstance(tile, DirectTile):
        pytest.skip("tensor cores have no fp32")
    for inputs in (plain(9, 20, 64, dtype), full(18, 20, 64, dtype)):
        assert_near(inputs.run(tile), inputs.expected(), dtype)


@pytest.mark.parametrize("tile", [GEMV[0], DIRECT[0]])
def test_fp16_meets_the_fp32_stream(tile: Tile) -> None:
    inputs = full(2, 20, 128, torch.float16)
    assert_near(inputs.run(tile), inputs.expected(), torch.float16)


def test_fp16_is_normed_before_it_is_rounded() -> None:
    inputs = full(2, 20, 64, torch.float16)
    inputs.x.mul_(1e6)
    assert_near(inputs.run(DIRECT[0]), inputs.expected(), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_default_tiles(rows: int, dtype: torch.dtype) -> None:
    inputs = full(rows, 40, 96, dtype)
    assert_near(inputs.run(None), inputs.expected(), dtype)


# numpy, which the interpreter computes with, warns of what comes of NaN and infinity.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("tile", TILES)
def test_a_row_does_not_depend_on_the_others(tile: Tile) -> None:
    dtype = DTYPES[-1]
    inputs = full(3, 20, 64, dtype)
    whole = inputs.run(tile)
    inputs.x[0], inputs.x[2] = torch.nan, torch.inf
    assert torch.equal(inputs.run(tile)[1], whole[1])


def test_rows_may_be_part_of_a_larger_tensor() -> None:
    inputs = plain(3, 20, 64, DTYPES[0])
    wide = normal(3, 96, dtype=DTYPES[0])
    wide[:, 16:80] = inputs.x
    out = normal(3, 32, dtype=DTYPES[0])
    rest = out[:, 20:].clone()
    norm_linear(wide[:, 16:80], inputs.weight, out[:, :20])
    assert_near(out[:, :20], inputs.expected(), DTYPES[0])
    assert torch.equal(out[:, 20:], rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_default_tiles_fit_every_shape(dtype: torch.dtype) -> None:
    for n, k in [(96, 96), (2048, 1408), (2048, 4096), (4096, 4096), (6144, 4096), (151936, 2048)]:
        for rows in (1, 2, 4, 8, 16, 17, 32, 33, 64, 128, 256):
            tile = default_tile(rows, n, k, dtype)
            assert rows <= {GemvTile: 8, DirectTile: 32, DotTile: 256}[type(tile)]
            assert dtype is not torch.float32 or not isinstance(tile, DirectTile)
            assert scratch_bytes(rows, n, k, dtype, norm=True) <= 2**26


MODEL_SHAPES = [(5120, 2048), (2048, 4096), (6144, 4096), (2048, 1408), (1536, 1024), (1000, 6400), (50304, 2048)]


@pytest.mark.skipif(not ON_GPU, reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), MODEL_SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 13, 32, 64, 100, 256])
def test_shapes_of_models(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    for inputs in (plain(rows, n, k, dtype), full(rows, n, k, dtype)):
        found = inputs.run(None)
        assert_near(found, inputs.expected(), dtype)
        assert torch.equal(found, inputs.run(None))


@pytest.mark.skipif(not ON_GPU, reason="dependent launches need a GPU")
@pytest.mark.parametrize("tile", [*GEMV, *DIRECT, *DOT, DirectTile(ahead=1, prefetch=512), DotTile(prefetch=256)])
def test_dependent_launches_change_nothing(tile: Tile) -> None:
    """A chain, each launch taking what the one before wrote: early starts must not read too early."""

    def chain(pdl: bool) -> Tensor:
        stream = start.clone()
        hidden = torch.empty(2, 512, dtype=torch.bfloat16, device=DEVICE)
        for _ in range(20):
            norm_linear(stream, down, hidden, norm_weight=norm_weight, eps=EPS, scratch=scratch, tile=tile, pdl=pdl)
            norm_linear(hidden, up, stream, residual=True, scratch=scratch, tile=tile, pdl=pdl)
        return stream

    start = normal(2, 2048)
    down = normal(512, 2048, dtype=torch.bfloat16, scale=0.02)
    up = normal(2048, 512, dtype=torch.bfloat16, scale=0.02)
    norm_weight = normal(2048, dtype=torch.bfloat16)
    scratch = torch.full((2**20,), 255, dtype=torch.uint8, device=DEVICE)
    assert torch.equal(chain(True), chain(False))
