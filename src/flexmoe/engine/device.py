"""Where and how to compute: device, threads, and the number format, by a short measurement where it is not given."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch

from flexmoe.config.model import ModelConfig
from flexmoe.errors import ConfigError
from flexmoe.kernels.linear import PackedLinear

_log = logging.getLogger(__name__)
_PROBE_BYTES = 32 * 2**20  # weights rotated through, so that a large cache does not hide the memory
_PROBE_SECONDS = 0.03


def choose_device(name: str) -> torch.device:
    """The named device; "auto" is CUDA where torch sees a GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a device; use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but torch {torch.__version__} sees no GPU here; use cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but there are {torch.cuda.device_count()} GPUs; use a lower index.")
    return device


def set_threads(threads: int | None) -> int:
    """Set torch's threads: as given, else one for each physical core this process may use."""
    count = threads or physical_cores()
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def physical_cores() -> int:
    """Physical cores among those the process may run on; a second hardware thread adds no arithmetic."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, len({_siblings(cpu) for cpu in allowed}))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def choose_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The named dtype; "auto" is the checkpoint's own, or fp32 on a CPU that computes faster in it.

    Widening keeps every weight exact, narrowing would not: so bf16 and fp16 may become fp32, never the reverse.
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    native: torch.dtype = getattr(torch, config.checkpoint_dtype)
    if device.type != "cpu" or native is torch.float32:
        return native
    seconds = {dtype: _probe(config, dtype) for dtype in (native, torch.float32)}
    best = min(seconds, key=lambda dtype: seconds[dtype])
    _log.info("dtype probe: %s; using %s.", {str(d): f"{s * 1e6:.0f} us" for d, s in seconds.items()}, best)
    return best


@torch.inference_mode()
def _probe(config: ModelConfig, dtype: torch.dtype) -> float:
    """Seconds for a small mix of what serving does: a projection of 1 row (decode) and of 32 rows (prefill)."""
    rows_in, rows_out = config.hidden_size, config.qkv_size
    size = rows_in * rows_out * dtype.itemsize
    weights = [torch.randn(rows_out, rows_in, dtype=dtype) for _ in range(max(1, min(16, _PROBE_BYTES // size)))]
    layers = [PackedLinear(weight) for weight in weights]
    few, many = torch.randn(1, rows_in, dtype=dtype), torch.randn(32, rows_in, dtype=dtype)
    best = float("inf")
    deadline = time.perf_counter() + _PROBE_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        for layer in layers:
            layer(few)
        layers[0](many)
        best = min(best, (time.perf_counter() - start) / len(layers))
    return best
