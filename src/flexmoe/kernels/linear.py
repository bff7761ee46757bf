"""y = x W^T + b, with the weight laid out once in the order the CPU's matrix library wants.

Enters: a weight [N, K] and an optional bias [N]. Leaves: a `PackedLinear` that maps [T, K] to [T, N].
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.kernels.quantize import QuantizedMatrix

_log = logging.getLogger(__name__)

_FEW_ROWS, _ROW_STEP = 16, 32


class PackedLinear:
    """A linear map whose weight may have been reordered (`prepack`).

    On a CPU in bf16, oneDNN's blocked layout saves it from reordering the weight in each call: measured 1.3-1.8x
    faster for 1 to 8 rows. In fp32 the plain layout is as fast, so it stays. On other devices it stays too.

    oneDNN also generates code for every new number of rows, about a millisecond each, and prompts and experts bring
    new ones all the time. So many rows are padded to a multiple of _ROW_STEP.
    """

    __slots__ = ("_bias", "_op", "_pads", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, prepack: bool = True) -> None:
        self._bias = bias
        self._op: Any = None
        self._weight = weight
        self._pads = weight.device.type == "cpu" and weight.dtype is not torch.float32
        if prepack and weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and _onednn_works():
            self._op = torch.ops.mkldnn._linear_pointwise.default
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self._pads and rows > _FEW_ROWS and rows % _ROW_STEP:
            return self._multiply(F.pad(x, (0, 0, 0, -rows % _ROW_STEP)))[:rows]
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if self._op is None:
            return F.linear(x, self._weight, self._bias)
        return self._op(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]


class QuantizedLinear:
    """A linear map whose weight is widened in each call: for many rows, beside which that costs little."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: QuantizedMatrix, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return PackedLinear(self._weight.dequantize(x.dtype), self._bias, prepack=False)(x)


@functools.cache
def _onednn_works() -> bool:
    """Whether torch's private packing operations exist here and agree with `F.linear`; asked once a process."""
    works = _try_onednn()
    if not works:
        _log.info("oneDNN weight packing is not available in torch %s; the plain layout is used.", torch.__version__)
    return works


def _try_onednn() -> bool:
    weight = torch.eye(32, dtype=torch.bfloat16)
    x = torch.arange(32, dtype=torch.bfloat16)[None]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        y = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return bool(torch.equal(x, y))
