"""How fast this device multiplies matrices. Enters: a device, a dtype. Leaves: multiply-adds a second, counted twice.

Measured for the same reason as the speed of memory (bandwidth.py): no product reaches a data sheet's figure.
"""

from __future__ import annotations

import functools
import time

import torch

_SIZE = {"cuda": 8192, "cpu": 1024}
_REPEATS, _LONGEST = 8, 1.0  # seconds: without units for a dtype a product of a CPU takes some


@functools.cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of some products of large square matrices, by torch. Measured once a process."""
    size = _SIZE[device.type]
    x = torch.randn(size, size, device=device).to(dtype)
    took: list[float] = []
    while not took or (len(took) < _REPEATS and sum(took) < _LONGEST):
        took.append(_seconds(x))
    return 2 * size**3 / min(took)


def _seconds(x: torch.Tensor) -> float:
    if x.is_cpu:
        start = time.perf_counter()
        torch.mm(x, x)
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.mm(x, x)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
