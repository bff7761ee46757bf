"""Drift: do steps take as long as was predicted? Enters: steps and their seconds. Leaves: a ratio, a line in the log.

Only an engine that was started for a named machine has one. The last steps are kept, with the terms of their
prediction: so much for experts, for attention, for collectives. When the median of measured over predicted leaves its
bound, the term is named whose error explains the steps best: the one of which a multiple, added to the prediction,
comes nearest to what was measured (least squares). Once the ratio has come back, a new drift is told again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median

from flexmoe.scheduling.step import Step

Predict = Callable[[Step], Mapping[str, float]]  # seconds by term

_log = logging.getLogger(__name__)

_WINDOW = 128  # steps that are looked at; as many must have passed before anything is said
_EVERY = 32  # steps between two looks
_BOUND = 1.5  # measured over predicted, or the reverse


class Drift:
    """Measured beside predicted. predicted, measured: seconds of all steps so far, with both sums growing together."""

    def __init__(self, predict: Predict, bound: float = _BOUND) -> None:
        self.predicted = self.measured = 0.0
        self.steps = 0
        self.drifted: str | None = None  # the term, while the ratio is beyond its bound
        self._predict, self._bound = predict, bound
        self._recent: deque[tuple[Mapping[str, float], float]] = deque(maxlen=_WINDOW)
        self._last_end = 0.0

    @property
    def ratio(self) -> float:
        """Median of measured over predicted, of the last steps; 1 before the first."""
        ratios = [seconds / (sum(terms.values()) or seconds) for terms, seconds in self._recent if seconds]
        return median(ratios) if ratios else 1.0

    def add(self, step: Step, began: float, ended: float) -> None:
        """A step was computed between these moments. One that was sent ahead begins when the one before it ends."""
        seconds = ended - max(began, self._last_end)
        self._last_end = ended
        terms = self._predict(step)
        self.predicted += sum(terms.values())
        self.measured += seconds
        self._recent.append((terms, seconds))
        self.steps += 1
        if self.steps >= _WINDOW and self.steps % _EVERY == 0:
            self._look()

    def _look(self) -> None:
        ratio = self.ratio
        if 1 / self._bound <= ratio <= self._bound:
            self.drifted = None
            return
        term, times = self._culprit()
        if self.drifted is None:
            _log.warning(
                "steps take %.2f times as long as predicted for this machine (bound %.2f); what explains it best is "
                "%s, %.2f times its prediction. `flexmoe bench machine` measures the machine anew.",
                ratio, self._bound, term, times,
            )  # fmt: skip
        self.drifted = term

    def _culprit(self) -> tuple[str, float]:
        """The term whose error explains the recent steps best, and by what its prediction should be multiplied."""
        best, found = float("inf"), ("overheads", 1.0)
        for name in sorted({name for terms, _ in self._recent for name in terms}):
            own = [terms.get(name, 0.0) for terms, _ in self._recent]
            missing = [seconds - sum(terms.values()) for terms, seconds in self._recent]
            square = sum(part * part for part in own)
            if not square:
                continue
            factor = sum(part * gap for part, gap in zip(own, missing, strict=True)) / square
            left = sum((gap - factor * part) ** 2 for part, gap in zip(own, missing, strict=True))
            if left < best:
                best, found = left, (name, 1 + factor)
        return found
