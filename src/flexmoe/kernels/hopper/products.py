"""Rows of many experts meet their experts' weights on Hopper's tensor cores: both halves of a MoE layer's experts.

Enters: rows grouped by slot, as `group_by_expert` lists them, and weights. Leaves: hidden [T*K, F] in the order of
slots, then y [T*K, H], one row an assignment. How it works is told in expert_products.cu.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmoe.errors import FlexMoEError
from flexmoe.kernels.hopper.compiler import compiled

_FOLDER = Path(__file__).parent
_HOPPER = (9, 0)
_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
# As in the kernel.
_WEIGHTS, _K, _MANY, _FEW, _SLOTS = 256, 64, 128, 32, 512
_THREADS, _SHARED_BYTES = 384, 223 * 1024
_COLUMNS = (32, 64, 96, *range(104, 161, 8))  # that a product can have
_PARTS = (False, True)  # down, gate_up


def why_no_products(
    capability: tuple[int, int], dtype: torch.dtype, slots: int, hidden: int, width: int
) -> str:  # fmt: skip
    """Why these kernels do not serve experts of a model on a GPU of that capability, or "" if they do."""
    if capability != _HOPPER:
        return "they are for Hopper GPUs"
    if dtype not in _TYPES:
        return f"they compute in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if slots > _SLOTS:
        return f"they take {_SLOTS} experts a GPU at most, not {slots}"
    if hidden % 8 or width % 8:
        return f"hidden_size={hidden} and the experts' width={width} are not multiples of 8"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the package cuda-bindings, which torch's builds for CUDA bring, is not installed"
    return ""


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
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernels = _kernels(device, dtype)
        self._progress = torch.zeros(2, 2, dtype=torch.int32, device=device)

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
        from cuda.bindings import driver

        rows = tensors[0]
        assert rows is not None
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, self._progress[int(first)])]
        arguments = _Arguments(*addresses, rows.stride(0), *sizes)
        pointers = (ctypes.c_void_p * 4)(*(int(each.getPtr()) for each in maps), ctypes.addressof(arguments))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._processors, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = _THREADS, 1, 1
        config.sharedMemBytes = _SHARED_BYTES
        config.hStream = torch.cuda.current_stream(self._device).cuda_stream
        if pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        _check(driver.cuLaunchKernelEx(config, self._kernels[first], ctypes.addressof(pointers), 0))


def cubin(gate_up: bool, dtype: torch.dtype, capability: tuple[int, int] = _HOPPER) -> bytes:
    """The machine code of one half, from the user's cache or compiled."""
    return compiled(_name(gate_up), *source(gate_up, dtype), capability)


def source(gate_up: bool, dtype: torch.dtype) -> tuple[str, dict[str, int | str]]:
    """One half's text and its macros."""
    kind = _TYPES[dtype]
    products = "\n".join(_product(n, kind) for n in _COLUMNS)
    cases = "\n".join(
        f"case {n}: compute_tile<{n}>(shared, args, tile, ring, staging, group, thread, steps, stage, parity); break;"
        for n in _COLUMNS
    )
    text = "".join((_FOLDER / name).read_text() for name in ("instructions.h", "expert_products.cu"))
    macros: dict[str, int | str] = {
        "NAME": _name(gate_up), "GATE_UP": int(gate_up), "HALF": int(kind == "f16"), "SHARED_BYTES": _SHARED_BYTES,
    }  # fmt: skip
    return text.replace("//PRODUCTS//", products).replace("//CASES//", cases), macros


def _name(gate_up: bool) -> str:
    """Of the kernel, as profilers show it."""
    return f"expert_{'gate_up' if gate_up else 'down'}_products"


def _product(n: int, kind: str) -> str:
    """One instruction: 64 rows by n columns, 16 deep, whose n / 2 sums a thread begin with it, or are added to."""
    count = n // 2
    sums = ", ".join(f"%{i}" for i in range(count))

    def function(name: str, access: str, add: int) -> str:
        outputs = ", ".join(f'"{access}f"(sums[{i}])' for i in range(count))
        return (
            f"static __device__ __forceinline__ void {name}(float (&sums)[{count}], u64 weights, u64 tokens) {{\n"
            f'    asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, {add}, 0;\\n"\n'
            f'        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{sums}}}, "\n'
            f'        "%{count}, %{count + 1}, add, 1, 1, 0, 0;\\n}}" : {outputs} : "l"(weights), "l"(tokens));\n}}\n'
        )

    return f"template <> struct Product<{n}> {{\n{function('first', '=', 0)}{function('add', '+', 1)}}};"


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Both, loaded: down, gate_up."""
    from cuda.bindings import driver

    capability = torch.cuda.get_device_capability(device)
    with ThreadPoolExecutor(len(_PARTS)) as pool:
        codes = list(pool.map(lambda gate_up: cubin(gate_up, dtype, capability), _PARTS))
    shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    found = []
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context the current one
        for gate_up, code in zip(_PARTS, codes, strict=True):
            function = _check(
                driver.cuModuleGetFunction(_check(driver.cuModuleLoadData(code)), _name(gate_up).encode())
            )
            _check(driver.cuFuncSetAttribute(function, shared, _SHARED_BYTES))
            found.append(function)
    return found[0], found[1]


def _boxes(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """See `_map`."""
    return _map(tensor.data_ptr(), tensor.dtype, shape, strides, box)


@functools.lru_cache(maxsize=4096)
def _map(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> Any:
    """How the copy engine finds boxes of a tensor; what is outside of it reads as zeros.

    shape, strides, box: innermost first, in elements; the innermost stride is 1 and not given.
    """
    from cuda.bindings import driver as d

    kinds = d.CUtensorMapDataType
    half = dtype is torch.float16
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    return _check(
        d.cuTensorMapEncodeTiled(
            kind, len(shape), address,
            [d.cuuint64_t(n) for n in shape], [d.cuuint64_t(dtype.itemsize * n) for n in strides],
            [d.cuuint32_t(n) for n in box], [d.cuuint32_t(1)] * len(shape),
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of the driver gave."""
    from cuda.bindings import driver

    error, *given = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise FlexMoEError(f"CUDA driver: {driver.cuGetErrorString(error)[1].decode()}")
    return given[0] if given else None
