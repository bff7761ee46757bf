"""Causal attention of prompts on Hopper's tensor cores. How it works is told in prompt_attention.cu.

Enters: queries of spans, whose keys and values the paged cache holds already. Leaves: one output row a query.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from flexmoe.kernels.hopper import driver, instructions
from flexmoe.kernels.hopper.compiler import compiled
from flexmoe.kernels.hopper.driver import HOPPER
from flexmoe.kernels.prefill_attention import Spans

_HEAD_DIM, _THREADS, _SHARED_BYTES = 128, 384, 225 * 1024
_NAME = "prompt_attention"
_LOG2_E = 1.4426950408889634


def why_no_attention(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str:
    """Why this kernel does not serve a model on a GPU of that capability, or "" if it does."""
    if capability != HOPPER:
        return "it is for Hopper GPUs"
    if dtype not in instructions.TYPES:
        return f"it computes in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim != _HEAD_DIM:
        return f"heads have {head_dim} numbers, not {_HEAD_DIM}"
    return driver.why_no_driver()


class _Arguments(ctypes.Structure):
    """As in the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cache", "spans", "blocks", "tables", "out")),
        *((name, ctypes.c_int) for name in ("num_heads", "num_kv_heads", "num_blocks", "block_bits", "window")),
        ("scale", ctypes.c_float),
    )


class PromptAttention:
    """For prompts on one GPU. See `why_no_attention`. rows: of the blocks that spans are cut into."""

    rows = 128

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of queries and cache. Compiles, if the user's cache has not: a second. Raises FlexMoEError."""
        self._kernel = _load(device, dtype)

    def __call__(
        self, query: Tensor, fresh: Tensor, cache: Tensor, spans: Spans, out: Tensor, *, window: int | None = None,
        pdl: bool = False,
    ) -> None:  # fmt: skip
        """As `flexmoe.kernels.prefill_attention`, to out [T, Hq D]; all contiguous, at most 2^31 slots.

        fresh: [T, 2, Hkv, D], the rows' own keys and values, which the cache has, too. Blocks of spans have `rows`
        rows; those that see many keys had best come first.
        """
        num_kv_heads, head_dim = cache.shape[2:]
        maps = (_rows_of(query), _rows_of(fresh))
        assert spans.block_rows == self.rows
        assert spans.block_size & (spans.block_size - 1) == 0
        tensors = (cache, spans.spans, spans.blocks, spans.tables, out)
        arguments = _Arguments(
            *(tensor.data_ptr() for tensor in tensors), query.shape[1] // head_dim, num_kv_heads, len(spans.blocks),
            spans.block_size.bit_length() - 1, window or 0, head_dim**-0.5 * _LOG2_E,
        )  # fmt: skip
        self._kernel.launch(*(int(each.getPtr()) for each in maps), ctypes.addressof(arguments), pdl=pdl)


def _rows_of(rows: Tensor) -> Any:
    """Boxes of 128 rows of a head, half of the columns behind the other. rows: [T, heads * D], in any shape."""
    count, half = len(rows), _HEAD_DIM // 2
    width = rows.numel() // count
    shape, strides = (half, count, 2, width // _HEAD_DIM), (width, half, _HEAD_DIM)
    return driver.boxes(rows.data_ptr(), rows.dtype, shape, strides, (half, PromptAttention.rows, 2, 1))


def source(dtype: torch.dtype) -> tuple[str, dict[str, int | str]]:
    """The kernel's text and macros."""
    macros: dict[str, int | str] = {"NAME": _NAME, "HALF": int(dtype is torch.float16), "SHARED_BYTES": _SHARED_BYTES}
    return instructions.source("prompt_attention.cu", dtype, Product=(_HEAD_DIM,), Weighted=(_HEAD_DIM,)), macros


@functools.cache
def _load(device: torch.device, dtype: torch.dtype) -> driver.Kernel:
    code = compiled(_NAME, *source(dtype), torch.cuda.get_device_capability(device))
    return driver.load(device, code, _NAME, _THREADS, _SHARED_BYTES)
