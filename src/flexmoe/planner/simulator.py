"""Simulator: requests through real schedulers on a virtual clock. Enters: requests, engines. Leaves: who got what when.

A discrete-event loop: the next thing that happens is an arrival, which the router gives to the replica with the fewest
tokens outstanding, or the end of a replica's step. All requests are served to their end, whatever that takes.

Many replicas are alike, and each is asked its share. So where there are more than can be simulated in the time at hand,
some of them are, with their share of the requests, and the rest is taken to fare the same; `Fleet` says how many.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexmoe.planner.replica import EngineLimits, Replica, Served, StepSeconds
from flexmoe.planner.trace import TraceRequest

_MOMENTS = 120  # of a time line


@dataclass(frozen=True, slots=True)
class Fleet:
    """Engines that are alike. replicas: there are; simulated: of these, with their share of the requests."""

    limits: EngineLimits
    seconds: StepSeconds
    gpus_each: int
    replicas: int
    simulated: int

    @property
    def gpus(self) -> int:
        return self.gpus_each * self.replicas


@dataclass(slots=True)
class TimeLine:
    """Figures of equal stretches of time, over all replicas simulated. width: seconds of one.

    tokens: generated. kv_used: largest share of a replica's KV cache. waiting: most requests that wait at a replica.
    """

    width: float
    tokens: list[int] = field(default_factory=lambda: [0] * _MOMENTS)
    kv_used: list[float] = field(default_factory=lambda: [0.0] * _MOMENTS)
    waiting: list[int] = field(default_factory=lambda: [0] * _MOMENTS)

    def add(self, now: float, replica: Replica, tokens: int) -> None:
        """A step has ended. What comes after the last arrival counts to the last stretch."""
        at = min(int(now / self.width), _MOMENTS - 1)
        self.tokens[at] += tokens
        self.kv_used[at] = max(self.kv_used[at], replica.kv_used)
        self.waiting[at] = max(self.waiting[at], replica.scheduler.num_waiting)


@dataclass(frozen=True, slots=True)
class Simulated:
    """Everything that happened. end: when the last step ended. busy: mean share of that time in steps."""

    served: list[Served]
    line: TimeLine
    end: float
    busy: float
    steps: int
    preemptions: int


def simulate(fleet: Fleet, requests: Sequence[TraceRequest]) -> Simulated:
    """Serve the requests, which are the share of the replicas simulated and come by arrival."""
    replicas = [Replica(fleet.limits, fleet.seconds) for _ in range(fleet.simulated)]
    served: dict[int, Served] = {}
    line = TimeLine(max(requests[-1].arrival, 1e-9) / _MOMENTS * (1 + 1e-9))
    running: list[tuple[float, int]] = []  # ends of steps, and whose
    now, ready = 0.0, fleet.limits.ready
    for number, request in sorted(enumerate(requests), key=lambda pair: ready(pair[1])):
        now = _advance(replicas, running, line, ready(request), now)
        chosen = min(range(len(replicas)), key=lambda index: replicas[index].outstanding)
        served[number] = replicas[chosen].add(number, request)
        if replicas[chosen].is_idle:
            _begin(replicas, running, chosen, ready(request))
    end = _advance(replicas, running, line, float("inf"), now)
    busy = sum(replica.busy for replica in replicas) / (len(replicas) * end) if end else 0.0
    steps, preemptions = (sum(getattr(r, name) for r in replicas) for name in ("steps", "preemptions"))
    return Simulated([served[number] for number in range(len(served))], line, end, busy, steps, preemptions)


def _advance(
    replicas: list[Replica], running: list[tuple[float, int]], line: TimeLine, until: float, now: float
) -> float:
    """End every step that ends before `until`, and begin those that follow. Returns when the last one ended."""
    while running and running[0][0] < until:
        now, index = running[0]
        replica = replicas[index]
        line.add(now, replica, replica.finish(now))
        seconds = replica.begin(now)
        if seconds is None:
            heapq.heappop(running)
        else:
            heapq.heapreplace(running, (now + seconds, index))
    return now


def _begin(replicas: list[Replica], running: list[tuple[float, int]], index: int, now: float) -> None:
    seconds = replicas[index].begin(now)
    assert seconds is not None, "a replica with a new request has something to do"
    heapq.heappush(running, (now + seconds, index))
