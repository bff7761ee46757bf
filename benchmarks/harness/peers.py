"""The end of the comparison with llama.cpp: all figures, then ours against the best peer of equal precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.setups import Setup

_PRECISION = {"bfloat16": "bf16", "bf16": "bf16", "int8": "8 bits", "q8_0": "8 bits"}
_WIDTH = 110  # a table that folds its words cannot be read
# Shape and metric: at most so many times the best peer's time.
MUST_HOLD = {
    ("60M", "decode_bs1"): 0.9,
    ("400M", "decode_bs1"): 1.0,
    **{(shape, "decode_bs4"): 0.85 for shape in ("60M", "400M")},
    **{(shape, "decode_bs16"): 0.75 for shape in ("60M", "400M")},
    **{(shape, "prefill_512"): 0.8 for shape in ("60M", "400M")},
}


@dataclass(frozen=True)
class Figure:
    """One engine's figures for one metric. percent: of the floor, where there is one."""

    shape: str
    metric: str
    setup: Setup
    unit: str
    summary: dict[str, Any]
    percent: float | None

    @property
    def median(self) -> float:
        return float(self.summary["median"])

    @property
    def cost(self) -> float:
        """Less is better."""
        return 1 / self.median if self.unit == "tokens/s" else self.median

    @property
    def precision(self) -> str:
        return _PRECISION[self.setup.dtype]


@dataclass(frozen=True)
class Verdict:
    """ratio: our time over the best peer's. limit: None where none was set."""

    ours: Figure
    peer: Figure
    limit: float | None

    @property
    def ratio(self) -> float:
        return self.ours.cost / self.peer.cost


def verdicts(figures: Sequence[Figure]) -> list[Verdict]:
    """Each of our figures against the best peer's of the same shape, metric and precision."""
    found = []
    for ours in (figure for figure in figures if figure.setup.ours):
        key = (ours.shape, ours.metric, ours.precision)
        peers = [f for f in figures if not f.setup.ours and (f.shape, f.metric, f.precision) == key]
        if peers:
            peer = min(peers, key=lambda figure: figure.cost)
            found.append(Verdict(ours, peer, MUST_HOLD.get((ours.shape, ours.metric))))
    return found


def print_figures(figures: Sequence[Figure]) -> None:
    """All figures, then the verdicts."""
    console = Console(width=max(Console().width, _WIDTH))
    every = Table("shape", "metric", "engine", "median", "p20-p80", "% of floor", title="All")
    for figure in figures:
        p20, median, p80 = (f"{figure.summary[key]:.3g}" for key in ("p20", "median", "p80"))
        percent = "" if figure.percent is None else f"{figure.percent:.0f}"
        shown = (figure.shape, figure.metric, str(figure.setup), f"{median} {figure.unit}", f"{p20}-{p80}", percent)
        every.add_row(*shown)
    console.print(every)
    title = "Our time over the best peer's of equal precision"
    ratios = Table("shape", "metric", "precision", "ours", "best peer", "which", "ratio", "must hold", title=title)
    for verdict in verdicts(figures):
        ours, peer = verdict.ours, verdict.peer
        held = "" if verdict.limit is None else "yes" if verdict.ratio <= verdict.limit else "NO"
        limit = "" if verdict.limit is None else f"<= {verdict.limit:g}: {held}"
        values = (f"{ours.median:.3g} {ours.unit}", f"{peer.median:.3g}", str(peer.setup), f"{verdict.ratio:.2f}")
        ratios.add_row(ours.shape, ours.metric, ours.precision, *values, limit)
    console.print(ratios)
