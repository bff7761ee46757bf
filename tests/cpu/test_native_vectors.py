"""The arithmetic under the C kernels, function by function: exp, rounding, sums over lanes, products, shares."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.kernels.cpu import levels, library
from flexmoe.kernels.quantize import QuantizedMatrix
from tests.cpu.nearness import assert_near
from tests.cpu.tiny_decoders import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER
CANARY = 12345.0
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=levels.available(), ids=lambda level: level.name)
def c(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """native_vectors.c, compiled as the kernels are for each instruction set of this processor."""
    compiler = library.find_compiler()
    assert compiler is not None
    target = tmp_path_factory.mktemp("vectors") / "vectors.so"
    source = Path(__file__).with_name("native_vectors.c")
    library._run(*levels.compile_command(compiler, request.param, source, target), f"-I{library._FOLDER}")
    return ctypes.CDLL(str(target))


def at(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data)


def long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def exp(c: ctypes.CDLL, x: Floats) -> Floats:
    padded = np.zeros(-(-x.size // 16) * 16, dtype=np.float32)
    padded[: x.size] = x
    y = np.full_like(padded, np.nan)
    c.t_exp(at(padded), at(y), long(padded.size))
    return y[: x.size]


def test_exp_is_within_3_units_in_the_last_place(c: ctypes.CDLL) -> None:
    edges = [0.0, -0.0, -1e-30, -1e-7, -0.34657, -0.34658, -0.6931, -1.0, -86.9999]
    x = np.concatenate((np.linspace(-87, 0, 200_001)[1:], edges)).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    off = np.abs(exp(c, x) - exact) / np.spacing(exact.astype(np.float32))
    assert off.max() <= 3.0, f"{off.max():.2f} units at {x[off.argmax()]}"
    assert (exp(c, np.zeros(3, dtype=np.float32)) == 1.0).all()


def test_exp_of_what_is_far_below_0_is_0(c: ctypes.CDLL) -> None:
    x = np.array([-87.0, -87.1, -88.0, -104.0, -1e3, -1e10, -3e38, -np.inf], dtype=np.float32)
    assert (exp(c, x) == 0.0).all()


def test_bf16_rounds_as_torch_does(c: ctypes.CDLL) -> None:
    """Ties, numbers too small to be normal, the largest, infinities and NaN among them."""
    bits = torch.randint(-(2**31), 2**31, (100_000,)).int()
    ties = (torch.randint(-(2**15), 2**15, (1000,)).int() << 16) + 0x8000
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.4e38, 3.3895e38, float("inf"), -float("inf"), float("nan")])
    x = torch.cat((bits.view(torch.float32), ties.view(torch.float32), special))
    y = torch.empty(len(x), dtype=torch.bfloat16)
    c.t_narrow(at(x), at(y), long(len(x)))
    wanted = x.bfloat16()
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.view(torch.int16)[~y.isnan()], wanted.view(torch.int16)[~y.isnan()])


def test_widening_is_exact(c: ctypes.CDLL) -> None:
    x = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    for function in (c.t_widen, c.t_widen16):
        y = torch.empty(len(x))
        function(at(x), at(y), long(len(x)))
        assert torch.equal(y.view(torch.int32), x.float().view(torch.int32))


def test_every_sum_over_lanes_has_the_same_order(c: ctypes.CDLL) -> None:
    for scale in (1.0, 1e6):
        x = (torch.randn(16, 16) * scale ** torch.rand(16, 16)).numpy()
        sums = [np.empty(16, dtype=np.float32) for _ in range(3)]
        c.t_sums(at(x), *map(at, sums))
        np.testing.assert_allclose(sums[0], x.astype(np.float64).sum(1), rtol=1e-4, atol=1e-4 * scale)
        assert (sums[0] == sums[1]).all()
        assert (sums[0] == sums[2]).all()


@given(
    n=st.integers(1, 11), k=st.integers(1, 100), rows=st.integers(1, 10) | st.sampled_from([63, 64, 65, 131]),
    form=st.integers(0, 3), columns=st.booleans(), bias=st.booleans(), add=st.booleans(),
    ends=st.tuples(st.integers(0, 11), st.integers(0, 11)),
)  # fmt: skip
def test_products_of_any_size(
    c: ctypes.CDLL, n: int, k: int, rows: int, form: int, columns: bool, bias: bool, add: bool, ends: tuple[int, int]
) -> None:
    """Only columns [from, to) of y are written, and each product is the one its row has alone."""
    first, last = sorted(min(end, n) for end in ends)
    dtype = torch.bfloat16 if form == 1 else torch.float32
    weight, offset = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    given, scales = weight, None
    if form > 1:
        matrix = QuantizedMatrix.empty(weight.shape, 8 if form == 2 else 4).copy_(weight)
        given, scales, weight = matrix.codes, at(matrix.scales), matrix.dequantize(torch.float32)
    x, before = torch.randn(rows, k), torch.randn(rows, n)
    head = [at(given), at(offset) if bias else None, scales, long(n), long(k), long(form)]
    tail = [int(add), int(form == 1), long(first), long(last), int(columns)]
    y = torch.cat((before.flatten(), torch.full((16,), CANARY)))
    c.t_linear(*head, at(x), at(y), long(rows), *tail)
    found = y[: rows * n].view(rows, n)
    for row in {0, rows // 2, rows - 1}:
        alone = before[row].clone()
        c.t_linear(*head, at(x[row]), at(alone), long(1), *tail)
        assert torch.equal(found[row], alone)
    if c.t_bf16_units() and columns and form > 0:
        x, weight = x.bfloat16(), weight.bfloat16()
    wanted = x.double() @ weight.double().T + (offset.double() if bias else 0) + (before.double() if add else 0)
    if first < last:
        lengths = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)[first:last] + 4
        assert ((found[:, first:last].double() - wanted[:, first:last]).abs() / lengths).max() < 1e-5
    found[:, first:last] = before[:, first:last]
    assert torch.equal(found, before)
    assert (y[rows * n :] == CANARY).all()


def test_swiglu_of_any_numbers(c: ctypes.CDLL) -> None:
    gate = torch.cat((torch.linspace(-100, 100, 3985), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 88, -88]),
                      torch.full((7,), float("nan"))))  # fmt: skip
    up, out = torch.randn(len(gate)), torch.empty(len(gate))
    c.t_swiglu(at(gate), at(up), at(out), long(len(gate)))
    wanted = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 1000])
def test_rms_norm(c: ctypes.CDLL, size: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(size) * 3, torch.randn(size).to(dtype)
    y = torch.full((size + 16,), CANARY)
    c.t_rms_norm(at(x), at(weight), long(size), ctypes.c_float(1e-5), int(dtype is torch.bfloat16), at(y))
    wide = x.double()
    assert_near(y[:size], wide / (wide.square().mean() + 1e-5).sqrt() * weight.double(), 1e-6)
    assert (y[size:] == CANARY).all()


@given(items=st.integers(0, 100), unit=st.sampled_from([1, 4, 16]), threads=st.integers(1, 9))
def test_shares_cover_everything_once(c: ctypes.CDLL, items: int, unit: int, threads: int) -> None:
    place = 0
    for thread in range(threads):
        first, last = ctypes.c_int64(), ctypes.c_int64()
        c.t_share(threads, thread, long(items), long(unit), ctypes.byref(first), ctypes.byref(last))
        assert first.value in (place, last.value)
        assert last.value % unit == 0 or last.value == items
        place = max(place, last.value)
    assert place == items
