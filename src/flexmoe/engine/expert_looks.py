"""Looks at which experts are chosen, in a few steps now and then. Enters: an engine's steps. Leaves: ExpertMetrics.

A look spans steps as they come, and holds back none of their outputs.
"""

from __future__ import annotations

import time

from flexmoe.engine.engine import Engine
from flexmoe.engine.metrics import ExpertMetrics

# Looking at experts slows the steps looked at; this bounds what that costs in all.
_SHARE = 0.01
_STEPS = 2  # the first may have been launched before the counting began


class ExpertLooks:
    """Of one engine, by the thread that drives it."""

    def __init__(self, engine: Engine, interval: float) -> None:
        """interval: seconds between looks, 0 for none."""
        self.metrics = ExpertMetrics()
        self._engine = engine
        self._usual = self._interval = interval if engine.config.moe is not None else 0.0
        self._next = time.monotonic() + self._interval
        self._left = 0  # steps of the look under way
        self._seconds = 0.0  # that it took so far
        self._least_pause = 0.0  # seconds that must lie between looks, by what the last one cost

    def every(self, seconds: float | None) -> None:
        """Look more often from now on; None: as usual. Called by any thread. Who never looks does not begin to."""
        self._interval = self._usual if seconds is None else min(self._usual, seconds)
        self._next = min(self._next, time.monotonic() + self._least_pause)

    def begin(self) -> None:
        """A step comes: look at it, if that is due."""
        if not self._left and self._interval > 0 and time.monotonic() >= self._next:
            self._engine.count_experts(True)
            self._left, self._seconds = _STEPS, 0.0

    def stepped(self, seconds: float) -> None:
        """The step is over, and its outputs are on their way: counts may have to wait for the step behind it."""
        if self._left:
            self._seconds += seconds
            self._left -= 1
            if not self._left:
                self._take()

    def end(self) -> None:
        """No step follows."""
        if self._left:
            self._left = 0
            self._take()

    def _take(self) -> None:
        start = time.monotonic()
        self.metrics.add(self._engine.expert_loads())
        self._engine.count_experts(False)
        now = time.monotonic()
        self._least_pause = (self._seconds + now - start) / _SHARE
        self._next = now + max(self._interval, self._least_pause)
