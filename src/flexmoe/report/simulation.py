"""Curves of simulations. Enters: points. Leaves: a PNG or SVG. Measured ones are filled, all others hollow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexmoe.errors import ConfigError, MissingDependencyError
from flexmoe.planner.figures import EXTRAPOLATED, MEASURED, PREDICTED, Point
from flexmoe.report import style

_Figure = Callable[[Point], float | None]

_PANELS: tuple[tuple[str, str, _Figure], ...] = (
    ("TTFT, p50", "ms", lambda point: point.ttft_ms.get("p50")),
    ("TTFT, p99", "ms", lambda point: point.ttft_ms.get("p99")),
    ("TPOT, p50", "ms", lambda point: point.tpot_ms.get("p50")),
    ("Throughput", "output tokens a second", lambda point: point.output_tokens_per_s),
    ("KV cache, fullest", "% of its blocks", lambda point: None if point.kv_used is None else 100 * point.kv_used),
)
_LINES = {PREDICTED: ("-", style.OURS), EXTRAPOLATED: ("--", style.MUTED), MEASURED: ("", style.INK)}


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Against the number of GPUs where that varies, else against the rate.

    Raises MissingDependencyError without matplotlib, ConfigError if the file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "drawing curves") from error
    by_gpus = len({point.gpus for point in points}) > 1
    canvas = Figure(figsize=(3.1 * len(_PANELS), 3.4), layout="constrained")
    for axes, panel in zip(canvas.subplots(1, len(_PANELS)), _PANELS, strict=True):
        _draw_panel(axes, points, panel, by_gpus=by_gpus)
    canvas.suptitle(title, color=style.INK, fontsize=11)
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    try:
        with mpl.rc_context({"svg.hashsalt": "flexmoe"}):
            canvas.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture {path} cannot be written: {error}.") from error


def _draw_panel(axes: Any, points: Sequence[Point], panel: tuple[str, str, _Figure], *, by_gpus: bool) -> None:
    name, unit, figure = panel
    for kind, (line, colour) in _LINES.items():
        pairs = sorted((p.gpus if by_gpus else p.rate, y) for p in points if p.kind == kind and (y := figure(p)))
        if pairs:
            face = colour if kind == MEASURED else style.PAPER
            axes.plot(*zip(*pairs, strict=True), line, color=colour, marker="o", markerfacecolor=face, label=kind)
    axes.set_title(name, loc="left", color=style.INK, fontsize=10)
    axes.set_xlabel("GPUs" if by_gpus else "requests a second", color=style.MUTED)
    axes.set_ylabel(unit, color=style.MUTED)
    if by_gpus:
        axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
