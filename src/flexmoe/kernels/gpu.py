"""What a GPU must have for the Triton kernels, and how much shared memory their tiles may take. Imports no triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import sysconfig
from pathlib import Path

import torch

from flexmoe.kernels.cpu.library import find_compiler

_LEAST_CAPABILITY = (8, 0)  # matrix units for bf16
_HOPPER = (9, 0)
_LARGEST_SHARED = 227 * 1024  # bytes a block of Hopper's; what tiles are chosen for where there is no GPU


def why_no_triton(device: torch.device) -> str:
    """Why no Triton kernel runs on a device, or "" if they do."""
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return ""  # no GPU to ask; whoever named one will be told so
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if not (os.environ.get("CC") or find_compiler()):
        return "Triton needs a C compiler to start its kernels (on Debian and Ubuntu: apt-get install gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Triton needs Python's headers to start its kernels (on Debian and Ubuntu: apt-get install python3-dev)"
    return ""


def stages_that_fit(stages: int, stage_bytes: int) -> int:
    """At most `stages` tiles of so many bytes in shared memory; at least one. Before Hopper one of them is in flight
    elsewhere.
    """
    limit, hopper = shared_memory()
    return max(1, min(stages, limit // stage_bytes + (0 if hopper else 1)))


def assume(shared: int, capability: tuple[int, int]) -> None:
    """From now on tiles are chosen for a GPU that is not here. shared: as `shared_memory` says there."""
    global _assumed  # noqa: PLW0603 - of a process that does nothing else
    _assumed = shared, capability >= _HOPPER
    shared_memory.cache_clear()


_assumed: tuple[int, bool] | None = None


@functools.cache
def shared_memory() -> tuple[int, bool]:
    """Bytes of the current GPU that a block may take, and whether it is Hopper or newer."""
    if _assumed is not None:
        return _assumed
    if not torch.cuda.is_available():
        return _LARGEST_SHARED, True
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    reserved = 1024  # of each block, by CUDA itself
    return properties.shared_memory_per_multiprocessor - reserved, (properties.major, properties.minor) >= _HOPPER
