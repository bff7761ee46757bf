"""How long a kernel takes in a decode step: inside a CUDA graph, on buffers that no cache still holds.

Enters: closures, one for each of the rotating sets of buffers. Leaves: microseconds a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Launch = Callable[[], None]

_LAUNCHES = 20  # in one graph, at least: the graph's own start must not count
_REPLAYS = 10
_SECONDS = 0.03  # of replays, at most
_FEWEST = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds a launch."""

    median: float
    p20: float
    p80: float


def time_launches(launches: list[Launch]) -> Timing:
    """Capture the closures, over and over until there are enough, in a CUDA graph; replay it against the clock."""
    rounds = -(-_LAUNCHES // len(launches))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())  # where the buffers are being filled
    with torch.cuda.stream(stream):
        for launch in launches:  # compiles, and lets lazy libraries set up what may not be set up while capturing
            launch()
        stream.synchronize()
        # Not torch.cuda.graph(), which empties the allocator's cache: hundreds of cases would wait for their memory.
        graph.capture_begin()
        try:
            for launch in launches * rounds:
                launch()
        finally:
            graph.capture_end()
        graph.replay()
        stream.synchronize()
    return _replay(graph, rounds * len(launches))


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> Timing:
    """The times of a graph of `count` launches: ten replays or 30 ms of them, whichever is less."""
    took: list[float] = []
    while len(took) < _FEWEST or (len(took) < _REPLAYS and sum(took) < _SECONDS * 1e6 / count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) * 1e3 / count)
    p20, median, p80 = torch.tensor(took).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(median, p20, p80)
