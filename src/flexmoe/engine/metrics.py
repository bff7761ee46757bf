"""EngineMetrics: what an engine has done, in numbers. Enters: its events. Leaves: counters and histograms.

Written by the engine's thread, read by others without a lock: each number is whole at any time, a histogram may be
one observation ahead of its sum. No monitoring system is known here; server/prometheus.py speaks to one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from flexmoe.config.routing import LayerLoad, imbalance
from flexmoe.engine.tracking import Sample, Tracked

# Upper bounds in seconds. Gaps between tokens are short, whole requests may take minutes.
_SHORT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_LONG = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class Histogram:
    """Observations by size. counts[i]: those up to bounds[i] and above the bound before; the last: all larger ones."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class EngineMetrics:
    """All that is counted of one engine since it was made. Seconds in the histograms.

    ttft: arrival to first token. itl: gaps between tokens of a sample. tpot: their mean over a finished sample. e2e:
    arrival to the end. queue: arrival to the first step that computes the request. finished: samples by finish_reason.
    """

    def __init__(self) -> None:
        self.ttft, self.e2e, self.queue = Histogram(_LONG), Histogram(_LONG), Histogram(_LONG)
        self.itl, self.tpot = Histogram(_SHORT), Histogram(_SHORT)
        self.prompt_tokens = self.generated_tokens = self.preemptions = self.steps = 0
        self.finished: Counter[str] = Counter()

    def launched(self, owners: Iterable[tuple[Tracked, Sample]], num_preempted: int, now: float) -> None:
        """A step was launched that computes something of these requests."""
        self.steps += 1
        self.preemptions += num_preempted
        for tracked, _ in owners:
            if tracked.scheduled is None:
                tracked.scheduled = now
                self.queue.observe(now - tracked.arrival)
                self.prompt_tokens += len(tracked.prompt_token_ids)

    def token(self, tracked: Tracked, sample: Sample, now: float) -> None:
        """A sample got a token."""
        self.generated_tokens += 1
        if tracked.first_token is None:
            tracked.first_token = now
            self.ttft.observe(now - tracked.arrival)
        if sample.last_token is None:
            sample.first_token = now
        else:
            self.itl.observe(now - sample.last_token)
        sample.last_token = now

    def ended(self, tracked: Tracked, now: float) -> None:
        """A request is over: finished, failed or aborted."""
        self.e2e.observe(now - tracked.arrival)
        for sample in tracked.samples:
            self.finished[sample.request.finish_reason or "abort"] += 1
            tokens = sample.request.num_output_tokens
            if sample.first_token is not None and sample.last_token is not None and tokens > 1:
                self.tpot.observe((sample.last_token - sample.first_token) / (tokens - 1))


class ExpertMetrics:
    """How busy the experts of each layer were, in the steps that were looked at."""

    def __init__(self) -> None:
        self.loads: dict[int, LayerLoad] = {}
        self.latest: dict[int, LayerLoad] = {}
        self.looks = 0

    def add(self, loads: Iterable[LayerLoad]) -> None:
        """The counts of a few more steps; of none, if all were launched before the counting began."""
        latest = {load.layer: load for load in loads if load.passes}
        if not latest:
            return
        # In this order: whoever reads between two of these finds the sum of every layer that was looked at.
        self.loads = self.loads | {
            layer: self.loads[layer].plus(load) if layer in self.loads else load for layer, load in latest.items()
        }
        self.latest = latest
        self.looks += 1

    def imbalance(self, layer: int) -> float:
        """Largest over mean number of tokens of a layer's experts, over all that was looked at."""
        return imbalance(self.loads[layer].counts)
