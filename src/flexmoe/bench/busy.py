"""How much of the time the device is at work while an engine serves. Enters: an engine with requests. Leaves: a share.

On a GPU a kernel's time is what torch's profiler saw, so that gaps inside of a step count as well as those between
steps; watching makes launches slower, hence the share is at least what it is without. On a CPU, where the host is the
device, it is the time inside of the runner: what is left is scheduling, tokens and text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flexmoe.engine.engine import Engine
from flexmoe.errors import ConfigError


def busy_share(engine: Engine, steps: int) -> float:
    """Over so many steps, or fewer if all requests end before. 0 to 1."""
    device = engine.local_device
    if device is not None and device.type == "cuda":
        return _on_gpu(engine, steps)
    return _on_cpu(engine, steps)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Of spans (start, length), how much time lies in at least one of them."""
    total = end = 0.0
    for start, length in sorted(spans):
        total += max(0.0, start + length - max(start, end))
        end = max(end, start + length)
    return total


def _step(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        if not engine.has_unfinished:
            return
        engine.step()


def _on_gpu(engine: Engine, steps: int) -> float:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        _step(engine, steps)
        torch.cuda.synchronize()
    # Kineto's own events: making torch's of some hundred thousand kernels takes longer than the run.
    results = seen.profiler.kineto_results if seen.profiler is not None else None
    events = [] if results is None else results.events()
    spans = [(float(e.start_ns()), float(e.duration_ns())) for e in events if e.device_type().name == "CUDA"]
    if not spans:
        raise ConfigError("torch's profiler saw no kernel on this GPU; it may need permission to read its counters.")
    first, last = min(start for start, _ in spans), max(start + length for start, length in spans)
    return covered(spans) / (last - first)


def _on_cpu(engine: Engine, steps: int) -> float:
    runner: Any = engine.local_runner
    launch: Callable[..., Any] = runner.launch
    inside = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        flight = launch(*args, **kwargs)
        inside += time.perf_counter() - start
        return flight

    runner.launch = timed
    start = time.perf_counter()
    try:
        _step(engine, steps)
    finally:
        del runner.launch
    return inside / (time.perf_counter() - start)
