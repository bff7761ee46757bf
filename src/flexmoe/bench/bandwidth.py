"""How fast this device reads memory. Enters: a device. Leaves: bytes a second, the best that a plain stream reached.

The ceiling is measured, not looked up: a data sheet's figure is never reached, and a virtual machine may have less.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flexmoe.layers import large_pages

_GPU_BYTES = 4 * 2**30  # far more than any cache
_CPU_BYTES = 2**29
_REPEATS = 5


@functools.cache
def read_bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes a second of the fastest read-only stream that was found within about `seconds`. Measured once a process.

    On a GPU a Triton kernel with a few shapes of block; on a CPU torch.dot of a vector with itself, see CpuStream.
    """
    if device.type != "cuda":
        return _on_cpu(seconds)
    best = _on_gpu(device, seconds)
    torch.cuda.empty_cache()  # what was read belongs to whoever comes next
    return best


class CpuStream:
    """Half a GiB on large pages, where an engine's weights lie, read by torch's threads."""

    def __init__(self) -> None:
        (self._x,) = large_pages.zeros([((_CPU_BYTES // 4,), torch.float32)])
        self._x.fill_(1.0)
        self.read()

    def read(self) -> float:
        """Read it once. Returns bytes a second."""
        start = time.perf_counter()
        torch.dot(self._x, self._x)
        return _CPU_BYTES / (time.perf_counter() - start)


def _on_cpu(seconds: float) -> float:
    stream, end, best = CpuStream(), time.perf_counter() + seconds, 0.0
    while time.perf_counter() < end:
        best = max(best, stream.read())
    return best


def _on_gpu(device: torch.device, seconds: float) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    count = min(_GPU_BYTES, free // 2) // 4 // 2**20 * 2**20
    x = torch.ones(count, device=device)
    end = time.perf_counter() + seconds
    best = 0.0
    for launch in _streams(x):
        launch()  # compiles
        took = min(_seconds(launch, device) for _ in range(_REPEATS))
        best = max(best, count * 4 / took)
        if time.perf_counter() > end:
            break
    return best


def _streams(x: Tensor) -> Iterator[Callable[[], None]]:
    """Ways to read x, the likeliest best first."""
    # Imported here: only GPUs need triton.
    from flexmoe.kernels.triton.stream_read import StreamReadTile, stream_read

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    for (block, warps), programs in itertools.product(((8192, 8), (4096, 4), (16384, 16)), (4, 8)):
        out = torch.empty(processors * programs, device=x.device)
        yield functools.partial(stream_read, x, out, tile=StreamReadTile(block, warps))


def _seconds(launch: Callable[[], None], device: torch.device) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(torch.cuda.current_stream(device))
    launch()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
