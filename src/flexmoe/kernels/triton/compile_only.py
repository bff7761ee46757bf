"""Launches that only compile: into Triton's cache on disk, for a GPU that need not be there.

Enters: a GPU's capability, and which kernels are wanted. From then on every launch in this process finds out what it
would run, has it compiled if it is wanted and not in the cache yet, with the C code that launches it, and does no more.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, library_dirs
from triton.runtime.jit import JITFunction

_WARP = 32


class NamedGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], _WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(capability: tuple[int, int], wanted: Callable[[str], bool]) -> None:
    """For the rest of this process. wanted: asked once for each kernel, as launches specialise it, by its name."""
    triton.runtime.driver.set_active(NamedGPU(capability))
    launch, make, passed = JITFunction.run, JITFunction._do_compile, set[str]()
    launchers = _can_make_launchers()

    def run(self: JITFunction[Any], *args: Any, **options: Any) -> Any:
        return launch(self, *args, **(options | {"warmup": True}))

    def compile_wanted(self: JITFunction[Any], key: Any, *args: Any, **options: Any) -> Any:
        name = f"{self.fn.__module__}.{self.fn.__name__} {key}"
        if name in passed:
            return None
        passed.add(name)
        if not wanted(name):
            return None
        kernel = make(self, key, *args, **options)
        if launchers:
            CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    JITFunction.run = run
    JITFunction._do_compile = compile_wanted


def _can_make_launchers() -> bool:
    """Whether the GPU driver's library is there, which they are bound to; that does not start it."""
    try:
        library_dirs()
    except (AssertionError, OSError):
        return False
    return True
