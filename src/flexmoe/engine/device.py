"""Where and how to compute: device, threads, and the number format, by a short measurement where it is not given."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from flexmoe.config.engine import CLEARLY_FASTER
from flexmoe.config.model import ModelConfig
from flexmoe.errors import ConfigError, EngineError
from flexmoe.kernels.linear import PackedLinear
from flexmoe.scheduling.roofline import StepTokens, step_tokens

_log = logging.getLogger(__name__)
_PROBE_BYTES = 8 * 2**20  # weights rotated through, so that a large cache does not hide the memory
_PROBE_SECONDS = 0.02
_MANY_ROWS = 64
_CGROUP = Path("/sys/fs/cgroup")


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


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Make a GPU this thread's own, since kernels and streams are those of the thread's device.

    Raises EngineError, in one line, where its memory runs out.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the memory of device {str(device)!r} ran out; lower kv_cache_memory, max_num_seqs or "
                "max_num_batched_tokens, or free what other programs hold."
            ) from error


def tokens_on(device: torch.device, config: ModelConfig, dtype: torch.dtype, *, local: bool = True) -> StepTokens:
    """How many tokens a step should compute there. local: this process may ask the device its name."""
    card = torch.cuda.get_device_name(device) if local and device.type == "cuda" else None
    return step_tokens(config, dtype.itemsize, device.type, card)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host there. To a GPU it travels without the host waiting for what runs there: from pinned memory,
    which torch, whose it is, gives to nobody else before the copy is over.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def set_threads(threads: int | None) -> int:
    """Set torch's threads: as given, else one for each physical core this process may use.

    More threads than processors are refused: those of the C kernels wait for each other without sleeping.
    """
    usable = len(_usable_processors())
    if threads is not None and threads > usable:
        raise ConfigError(f"threads={threads} is above the {usable} processors that this process may use.")
    count = threads or physical_cores()
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def physical_cores() -> int:
    """Physical cores that the process may keep busy; a second hardware thread adds no arithmetic."""
    cores = len({_siblings(cpu) for cpu in _usable_processors()})
    return max(1, int(min(cores, _granted_processors())))


def _granted_processors() -> float:
    """How many processors' time a container gets. With more busy threads than that it is stopped again and again."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except OSError:  # version 1 of control groups, or none
        try:
            quota, period = ((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return math.inf
    return math.inf if quota.strip() in ("max", "-1") else float(quota) / float(period)


def _usable_processors() -> Collection[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def choose_dtype(
    name: str, config: ModelConfig, device: torch.device, *, few_rows_in_c: bool, prompts_in_c: bool = False
) -> torch.dtype:
    """The named dtype; "auto" is the checkpoint's own, or fp32 on a CPU that is clearly faster in it.

    Widening keeps every weight exact, narrowing would not: so bf16 and fp16 may become fp32, never the reverse.
    few_rows_in_c: steps of few rows do not go through torch, but through the C kernels, which read half the bytes in
    a 16-bit dtype; only products of many rows need measuring then. prompts_in_c: neither do those, so nothing is
    measured, and the format is the same at every start, however busy the machine is.
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    native: torch.dtype = getattr(torch, config.checkpoint_dtype)
    if device.type != "cpu" or native is torch.float32:
        return native
    if few_rows_in_c and native is torch.float16:
        return torch.float32  # the C kernels, in fp32 or bf16 only, decode more than twice as fast as torch
    if prompts_in_c:
        return native
    rows = (_MANY_ROWS,) if few_rows_in_c else (1, _MANY_ROWS)
    own, wide = (_probe(config, dtype, rows) for dtype in (native, torch.float32))
    chosen = torch.float32 if wide * CLEARLY_FASTER < own else native
    _log.info("dtype probe: %s %.0f us, float32 %.0f us; using %s.", native, own * 1e6, wide * 1e6, chosen)
    return chosen


def tell_of_slow_dtype(name: str, device: torch.device) -> None:
    """A warning for whoever asks for fp16 on a CPU; called once for an engine, however many ranks it has."""
    if name == "float16" and device.type == "cpu":
        _log.warning(
            "dtype=float16 is slow on a CPU; use dtype=auto, which takes the checkpoint's own format or float32, "
            "whichever is quicker here."
        )


@torch.inference_mode()
def _probe(config: ModelConfig, dtype: torch.dtype, rows: Sequence[int]) -> float:
    """Seconds for projections of the model's size on so many rows each, with weights that come from memory."""
    size_in, size_out = config.hidden_size, config.qkv_size
    count = max(1, min(16, _PROBE_BYTES // (size_in * size_out * dtype.itemsize)))
    layers = [PackedLinear(torch.full((size_out, size_in), 0.5, dtype=dtype)) for _ in range(count)]
    inputs = [torch.full((n, size_in), 0.5, dtype=dtype) for n in rows]
    best = float("inf")
    deadline = time.perf_counter() + _PROBE_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        for layer in layers:
            for x in inputs:
                layer(x)
        best = min(best, (time.perf_counter() - start) / count)
    return best
