"""Rows of many experts meet their experts' weights on Hopper's tensor cores: both halves of a MoE layer's experts.

Enters: rows grouped by slot, as `group_by_expert` lists them, and weights. Leaves: hidden [T*K, F] in the order of
slots, then y [T*K, H], one row an assignment. How it works is told in expert_products.cu.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flexmoe.kernels.hopper import driver, instructions
from flexmoe.kernels.hopper.compiler import compiled
from flexmoe.kernels.hopper.driver import HOPPER

# As in the kernel.
_K, _MANY, _FEW, _SLOTS = 64, 128, 32, 512
_THREADS, _SHARED_BYTES = 384, 227 * 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block of threads works at, see expert_products.cu. weights, tokens: rows of them, of tokens at most.

    fine_from: of fewer tokens not each size has a product of its own, they are bound by their weights in any case.
    """

    weights: int
    tokens: int
    stages: int
    staging: int
    fine_from: int = 96

    @property
    def parts(self) -> int:
        """Products that tokens are shared out to: two where a warpgroup holds its weights, as in the kernel."""
        return 256 // self.weights

    @property
    def columns(self) -> tuple[int, ...]:
        """Tokens that there are products for."""
        step = 8 * self.parts
        return (*range(32, self.fine_from + 1, 32), *range(self.fine_from + step, self.tokens + 1, step))


Shape = Literal["narrow", "square", "wide"]
_TILES: dict[Shape, Tile] = {
    "narrow": Tile(weights=256, tokens=160, stages=4, staging=4096),
    "square": Tile(weights=128, tokens=288, stages=4, staging=4096, fine_from=192),
    "wide": Tile(weights=256, tokens=192, stages=3, staging=16384),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One of the kernels: of a half of the experts, in tiles of one shape.

    Square ones ask least of shared memory, if an expert's rows fill one; wide ones, for hundreds of rows an expert, of
    L2. Only narrow ones gather rows: threads bring one of 128 bytes in 5 ns, and other shapes want them faster. Square
    ones are for the second half alone: of rows that were copied they gain 3% in the first.
    """

    gate_up: bool
    shape: Shape

    @property
    def name(self) -> str:
        """As profilers show it."""
        suffix = "" if self.shape == "narrow" else f"_{self.shape}"
        return f"expert_{'gate_up' if self.gate_up else 'down'}_products{suffix}"

    @property
    def tile(self) -> Tile:
        """What its blocks of threads work at."""
        return _TILES[self.shape]

    @property
    def gathers(self) -> bool:
        """Whether it takes tokens from where they are, not in the order of slots."""
        return self.gate_up and self.shape == "narrow"


PARTS = tuple(Part(gate_up, shape) for gate_up in (True, False) for shape in _TILES if not gate_up or shape != "square")


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
        """dtype: of rows and weights. Compiles, if the user's cache has not, for some seconds. See `why_no_products`.

        Raises FlexMoEError if NVRTC or the driver refuses.
        """
        self._device, self._dtype = device, dtype
        self._kernels = _kernels(device, dtype)
        self._progress = torch.zeros(2, 2, dtype=torch.int32, device=device)

    def another(self) -> ExpertProducts:
        """The same kernels for launches that do not follow this object's."""
        return ExpertProducts(self._device, self._dtype)

    def gate_up(
        self, x: Tensor, rows: Tensor, counts: Tensor, gate_up: Tensor, hidden: Tensor, *, top_k: int,
        shape: Shape = "narrow", pdl: bool = False,
    ) -> None:  # fmt: skip
        """x [T, H], gate_up [S, 2F, H], gate first -> hidden [T*K, F] = silu(gate) * up: rows of slot 0, of slot 1...

        rows int32 [S, capacity]: the assignments a = t*K + k of slot s, of which the first counts[s] (int32) are valid.
        All of one dtype and contiguous, rows but for their capacity. What no slot has leaves hidden's last rows alone.
        shape: of tiles, narrow or wide; results are the same. For wide ones x is [T*K, H], in hidden's order, as
        `copy_by_expert` makes it.
        """
        S, F, H = gate_up.shape[0], gate_up.shape[1] // 2, gate_up.shape[2]
        if S > _SLOTS:
            raise ValueError(f"gate_up has {S} experts, of which {_SLOTS} are the most.")
        if (part := Part(True, shape)) not in PARTS:
            raise ValueError(f"gate and up have no {shape} tiles")
        box = _K, 8, 2, part.tile.weights // 16, 1
        weights = _boxes(gate_up, (H, 8, 2, F // 8, S), (H, F * H, 8 * H, 2 * F * H), box)
        maps = (weights, weights, weights) if part.gathers else (weights, *_tokens(x))
        self._launch(part, maps, (rows, counts, None, x, hidden), (S, top_k, H, F), pdl)

    def down(
        self, hidden: Tensor, rows: Tensor, counts: Tensor, topk_weights: Tensor, down: Tensor, y: Tensor, *,
        shape: Shape = "narrow", pdl: bool = False,
    ) -> None:  # fmt: skip
        """hidden [T*K, F] of `gate_up`, down [S, H, F] -> row a of y [T*K, H]: topk_weights[a] * (down @ its row).

        topk_weights fp32 [T, K]. Assignments of no slot get no row of y. shape: as for `gate_up`.
        """
        S, H, F = down.shape
        part = Part(False, shape)
        weights = _boxes(down, (F, H, S), (F, H * F), (_K, part.tile.weights, 1))
        tensors = (rows, counts, topk_weights, None, y)
        self._launch(part, (weights, *_tokens(hidden)), tensors, (S, 1, F, H), pdl)

    def _launch(
        self, part: Part, maps: tuple[Any, Any, Any], tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...],
        pdl: bool,
    ) -> None:  # fmt: skip
        """tensors: rows, counts, scales, x, out. sizes: slots, top_k, depth, width."""
        rows = tensors[0]
        assert rows is not None
        tensors = (*tensors, self._progress[int(part.gate_up)])
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        arguments = _Arguments(*addresses, rows.stride(0), *sizes)
        pointers = (int(each.getPtr()) for each in maps)
        self._kernels[part].launch(*pointers, ctypes.addressof(arguments), pdl=pdl)


def cubin(part: Part, dtype: torch.dtype, capability: tuple[int, int] = HOPPER) -> bytes:
    """A kernel's machine code, from the user's cache or compiled."""
    return compiled(part.name, *source(part, dtype), capability)


def source(part: Part, dtype: torch.dtype) -> tuple[str, dict[str, int | str]]:
    """A kernel's text and its macros."""
    tile = part.tile
    cases = "\n".join(
        f"case {n}: compute_tile<{n}>(shared, args, tile, ring, staging, group, thread, steps, stage, parity); break;"
        for n in tile.columns
    )
    macros: dict[str, int | str] = {
        "NAME": part.name, "GATE_UP": int(part.gate_up), "GATHER": int(part.gathers),
        "HALF": int(dtype is torch.float16), "SHARED_BYTES": _SHARED_BYTES, "TILE_M": tile.weights,
        "MAX_N": tile.tokens, "STAGES": tile.stages, "STAGING": tile.staging, "FINE_FROM": tile.fine_from,
        "MAX_SLOTS": _SLOTS,
    }  # fmt: skip
    sizes = [n // tile.parts for n in tile.columns]
    named = {"Product": sizes} if tile.parts == 1 else {"Held": sizes}
    return instructions.source("expert_products.cu", dtype, **named).replace("//CASES//", cases), macros


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> dict[Part, driver.Kernel]:
    """All, loaded."""
    capability = torch.cuda.get_device_capability(device)
    with ThreadPoolExecutor(len(PARTS)) as pool:
        codes = list(pool.map(lambda part: cubin(part, dtype, capability), PARTS))
    return {
        part: driver.load(device, code, part.name, _THREADS, _SHARED_BYTES)
        for part, code in zip(PARTS, codes, strict=True)
    }


def _tokens(rows: Tensor) -> tuple[Any, Any]:
    """Large and small boxes of rows [N, depth]."""
    count, depth = rows.shape
    return _boxes(rows, (depth, count), (depth,), (_K, _MANY)), _boxes(rows, (depth, count), (depth,), (_K, _FEW))


def _boxes(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """See `driver.boxes`."""
    return driver.boxes(tensor.data_ptr(), tensor.dtype, shape, strides, box)
