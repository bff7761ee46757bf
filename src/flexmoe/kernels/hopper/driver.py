"""Launches of kernels that are not Triton's. Enters: a cubin, then arguments. Leaves: launches on torch's stream."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from flexmoe.errors import FlexMoEError

HOPPER = (9, 0)


def why_no_driver() -> str:
    """Why nothing can be launched, or ""."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the package cuda-bindings, which torch's builds for CUDA bring, is not installed"
    return ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One function of a module, loaded on a device, that has one block of threads a processor."""

    function: Any
    device: torch.device
    processors: int
    threads: int
    shared_bytes: int

    def launch(self, *arguments: int, pdl: bool = False) -> None:
        """On the device's current stream. Raises FlexMoEError.

        arguments: addresses of what the kernel takes by value. pdl: it may start before the last one has ended.
        """
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self.processors, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        if pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        pointers = (ctypes.c_void_p * len(arguments))(*arguments)
        check(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


def load(device: torch.device, code: bytes, name: str, threads: int, shared_bytes: int) -> Kernel:
    """The kernel `name` of a cubin, for blocks of so many threads and bytes of shared memory. Raises FlexMoEError."""
    from cuda.bindings import driver

    shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context the current one
        function = check(driver.cuModuleGetFunction(check(driver.cuModuleLoadData(code)), name.encode()))
        check(driver.cuFuncSetAttribute(function, shared, shared_bytes))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Kernel(function, device, processors, threads, shared_bytes)


@functools.lru_cache(maxsize=4096)
def boxes(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> Any:
    """How the copy engine finds boxes of a tensor, whose rows are swizzled on the way; what is outside reads as zeros.

    dtype: bfloat16 or float16. shape, strides, box: innermost first, in elements; the innermost stride is 1 and not
    given. The result has the address of 128 bytes that a kernel takes by value: `getPtr`. Raises FlexMoEError.
    """
    from cuda.bindings import driver as d

    kinds = d.CUtensorMapDataType
    half = dtype is torch.float16
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    return check(
        d.cuTensorMapEncodeTiled(
            kind, len(shape), address,
            [d.cuuint64_t(n) for n in shape], [d.cuuint64_t(dtype.itemsize * n) for n in strides],
            [d.cuuint32_t(n) for n in box], [d.cuuint32_t(1)] * len(shape),
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip


def check(result: tuple[Any, ...]) -> Any:
    """What a call of the driver gave. Raises FlexMoEError."""
    from cuda.bindings import driver

    error, *given = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise FlexMoEError(f"CUDA driver: {driver.cuGetErrorString(error)[1].decode()}")
    return given[0] if given else None
