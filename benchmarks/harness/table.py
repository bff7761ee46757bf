"""The end of a comparison: every configuration, and ours against the best of theirs. Enters: results. Leaves: print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

# Metric: at least how many times ours must be better than the best configuration of theirs.
MUST_HOLD = {"decode_bs1": 2.0, "decode_bs8": 2.0, "prefill_512": 1.0, "start_to_first_token": 2.0}
_OURS = "flexmoe auto"  # what a user gets who chooses nothing


@dataclass(frozen=True)
class Result:
    """One configuration's figures for one metric. Less is better in all of them."""

    metric: str
    name: str
    ours: bool
    unit: str
    summary: dict[str, Any]
    answers: str = ""

    @property
    def median(self) -> float:
        return float(self.summary["median"])


@dataclass(frozen=True)
class Verdict:
    """ratio: how many times better ours is. target: None where none was set."""

    metric: str
    ours: Result
    theirs: Result
    target: float | None

    @property
    def ratio(self) -> float:
        return self.theirs.median / self.ours.median

    @property
    def holds(self) -> bool | None:
        return None if self.target is None else self.ratio >= self.target


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """For each metric ours as it comes, against the best of theirs."""
    found = []
    for metric in dict.fromkeys(result.metric for result in results):
        same = [result for result in results if result.metric == metric]
        ours = next(result for result in same if result.name == _OURS)
        theirs = min((result for result in same if not result.ours), key=lambda result: result.median)
        found.append(Verdict(metric, ours, theirs, MUST_HOLD.get(metric)))
    return found


def print_table(results: Sequence[Result]) -> None:
    """All results, then the verdicts."""
    console = Console()
    every = Table("metric", "engine", "median", "p20-p80", "equal answers", title="All")
    for result in results:
        p20, median, p80 = (f"{result.summary[key]:.3g}" for key in ("p20", "median", "p80"))
        every.add_row(result.metric, result.name, f"{median} {result.unit}", f"{p20}-{p80}", result.answers)
    console.print(every)
    ratios = Table("metric", "ours", "theirs", "which of theirs", "ratio", "must hold", title="Ours as it comes")
    for verdict in verdicts(results):
        ours, theirs = (f"{r.median:.3g} {r.unit}" for r in (verdict.ours, verdict.theirs))
        target = "" if verdict.target is None else f"{verdict.target:g}x: {'yes' if verdict.holds else 'NO'}"
        ratios.add_row(verdict.metric, ours, theirs, verdict.theirs.name, f"{verdict.ratio:.2f}x", target)
    console.print(ratios)
