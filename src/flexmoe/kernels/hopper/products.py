"""Rows of many experts meet their experts' weights on Hopper's tensor cores: both halves of a MoE layer's experts.

Enters: rows grouped by slot, as `group_by_expert` lists them, and weights. Leaves: hidden [T*K, F] in the order of
slots, then y [T*K, H], one row an assignment. How it works is told in expert_products.cu.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from flexmoe.kernels.hopper import driver, instructions
from flexmoe.kernels.hopper.compiler import compiled
from flexmoe.kernels.hopper.driver import HOPPER

# As in the kernel.
_WEIGHTS, _K, _MANY, _FEW, _SLOTS = 256, 64, 128, 32, 512
_THREADS, _SHARED_BYTES = 384, 223 * 1024
_COLUMNS = (32, 64, 96, *range(104, 161, 8))  # that a product can have
_PARTS = (False, True)  # down, gate_up


def why_no_products(
    capability: tuple[int, int], dtype: torch.dtype, slots: int, hidden: int, width: int
) -> str:  # fmt: skip
    """Why these kernels do not serve experts of a model on a GPU of that capability, or "" if they do."""
    if capability != HOPPER:
        return "they are for Hopper GPUs"
    if dtype not in instructions.TYPES:
        return f"they compute in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if slots > _SLOTS:
        return f"they take {_SLOTS} experts a GPU at most, not {slots}"
    if hidden % 8 or width % 8:
        return f"hidden_size={hidden} and the experts' width={width} are not multiples of 8"
    return driver.why_no_driver()


class _Arguments(ctypes.Structure):
    """As in the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "counts", "scales", "x", "out", "progress")),
        *((name, ctypes.c_int) for name in ("capacity", "slots", "top_k", "depth", "width")),
    )


class ExpertProducts:
    """Both halves, for one engine on one GPU: launches of one object must follow each other, as on one stream."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of rows and weights. Compiles, if the user's cache has not: 4 seconds. See `why_no_products`.

        Raises FlexMoEError if NVRTC or the driver refuses.
        """
        self._device, self._dtype = device, dtype
        self._kernels = _kernels(device, dtype)
        self._progress = torch.zeros(2, 2, dtype=torch.int32, device=device)

    def another(self) -> ExpertProducts:
        """The same kernels for launches that do not follow this object's."""
        return ExpertProducts(self._device, self._dtype)

    def gate_up(
        self, x: Tensor, rows: Tensor, counts: Tensor, gate_up: Tensor, hidden: Tensor, *, top_k: int, pdl: bool = False
    ) -> None:
        """x [T, H], gate_up [S, 2F, H], gate first -> hidden [T*K, F] = silu(gate) * up: rows of slot 0, of slot 1...

        rows int32 [S, capacity]: the assignments a = t*K + k of slot s, of which the first counts[s] (int32) are valid.
        All of one dtype and contiguous, rows but for their capacity. What no slot has leaves hidden's last rows alone.
        """
        S, F, H = gate_up.shape[0], gate_up.shape[1] // 2, gate_up.shape[2]
        if S > _SLOTS:
            raise ValueError(f"gate_up has {S} experts, of which {_SLOTS} are the most.")
        weights = _boxes(
            gate_up, (H, 8, 2, F // 8, S), (H, F * H, 8 * H, 2 * F * H), (_K, 8, 2, _WEIGHTS // 16, 1)
        )  # fmt: skip
        self._launch(True, (weights, weights, weights), (rows, counts, None, x, hidden), (S, top_k, H, F), pdl)

    def down(
        self, hidden: Tensor, rows: Tensor, counts: Tensor, topk_weights: Tensor, down: Tensor, y: Tensor, *,
        pdl: bool = False,
    ) -> None:  # fmt: skip
        """hidden [T*K, F] of `gate_up`, down [S, H, F] -> row a of y [T*K, H]: topk_weights[a] * (down @ its row).

        topk_weights fp32 [T, K]. Assignments of no slot get no row of y.
        """
        S, H, F = down.shape
        weights = _boxes(down, (F, H, S), (F, H * F), (_K, _WEIGHTS, 1))
        many, few = (_boxes(hidden, (F, len(hidden)), (F,), (_K, count)) for count in (_MANY, _FEW))
        self._launch(False, (weights, many, few), (rows, counts, topk_weights, None, y), (S, 1, F, H), pdl)

    def _launch(
        self, first: bool, maps: tuple[Any, Any, Any], tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...],
        pdl: bool,
    ) -> None:  # fmt: skip
        """tensors: rows, counts, scales, x, out. sizes: slots, top_k, depth, width."""
        rows = tensors[0]
        assert rows is not None
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, self._progress[int(first)])]
        arguments = _Arguments(*addresses, rows.stride(0), *sizes)
        pointers = (int(each.getPtr()) for each in maps)
        self._kernels[first].launch(*pointers, ctypes.addressof(arguments), pdl=pdl)


def cubin(gate_up: bool, dtype: torch.dtype, capability: tuple[int, int] = HOPPER) -> bytes:
    """The machine code of one half, from the user's cache or compiled."""
    return compiled(_name(gate_up), *source(gate_up, dtype), capability)


def source(gate_up: bool, dtype: torch.dtype) -> tuple[str, dict[str, int | str]]:
    """One half's text and its macros."""
    cases = "\n".join(
        f"case {n}: compute_tile<{n}>(shared, args, tile, ring, staging, group, thread, steps, stage, parity); break;"
        for n in _COLUMNS
    )
    macros: dict[str, int | str] = {
        "NAME": _name(gate_up), "GATE_UP": int(gate_up), "HALF": int(dtype is torch.float16),
        "SHARED_BYTES": _SHARED_BYTES,
    }  # fmt: skip
    return instructions.source("expert_products.cu", dtype, _COLUMNS).replace("//CASES//", cases), macros


def _name(gate_up: bool) -> str:
    """Of the kernel, as profilers show it."""
    return f"expert_{'gate_up' if gate_up else 'down'}_products"


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> tuple[driver.Kernel, driver.Kernel]:
    """Both, loaded: down, gate_up."""
    capability = torch.cuda.get_device_capability(device)
    with ThreadPoolExecutor(len(_PARTS)) as pool:
        codes = list(pool.map(lambda gate_up: cubin(gate_up, dtype, capability), _PARTS))
    down, gate_up = (
        driver.load(device, code, _name(half), _THREADS, _SHARED_BYTES)
        for half, code in zip(_PARTS, codes, strict=True)
    )
    return down, gate_up


def _boxes(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """See `driver.boxes`."""
    return driver.boxes(tensor.data_ptr(), tensor.dtype, shape, strides, box)
