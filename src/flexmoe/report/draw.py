"""Figures on paper. Enters: a Figure of charts.py. Leaves: a matplotlib figure, which holds exactly its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flexmoe.report import style
from flexmoe.report.figure import ENGINES, Figure, Panel, Point

_CLIP = 1.28  # bars above the highest of ours, the floor and vLLM times this are cut, with their value written on them
_LEAST_GROUPS = 3  # a single group of bars does not become as wide as the page
_INCHES = {
    "latency": (15.4, 3.7),
    "experts": (6.2, 3.1),
    "cpu": (6.2, 3.1),
    "operations": (6.2, 3.1),
    "profiled": (6.2, 3.1),
}
_FEWEST_BARS = 3
_HIGHEST = 1.4  # times of one GPU that a bar shows
_INCHES |= {"strategies": (9.6, 2.7), "spread": (9.6, 2.8), "throughput": (9.6, 1.8), "served": (7.4, 2.9)}


def draw(figure: Figure) -> Any:
    """A new matplotlib figure; the caller saves and closes it."""
    import matplotlib.pyplot as plt

    columns = len(figure.panels)
    canvas, axes = plt.subplots(1, columns, figsize=_INCHES[figure.name], squeeze=False, layout="constrained")
    kinds: dict[str, Callable[[Any, Panel, int], None]] = {
        "latency": _latency,
        "experts": _experts,
        "pairs": _pair,
        "bars": _bars,
        "stack": _stack,
        "spread": _spread,
    }
    for column, panel in enumerate(figure.panels):
        _plain(axes[0][column])
        axes[0][column].set_title(panel.title, loc="left", fontweight="semibold", fontsize=15, color=style.INK, pad=10)
        kinds[figure.kind](axes[0][column], panel, column)
    if figure.kind == "spread":
        top = max(one.get_ylim()[1] for one in axes[0])
        for one in axes[0]:
            one.set_ylim(0, top)
    if figure.unit:
        (axes[0][0].set_xlabel if figure.kind == "stack" else axes[0][0].set_ylabel)(figure.unit)
    if figure.kind in ("latency", "spread", "experts"):
        _legend_below(canvas, axes[0], {ENGINES["floor"]: style.INK} if figure.kind == "latency" else {})
    return canvas


def settings() -> dict[str, Any]:
    """matplotlib's, for `rc_context`: type as outlines, so that a picture looks the same everywhere."""
    return {
        "font.family": style.FONT,
        "font.size": 13,
        "axes.labelcolor": style.MUTED,
        "axes.edgecolor": style.RULE,
        "xtick.color": style.MUTED,
        "ytick.color": style.MUTED,
        "svg.fonttype": "path",
        "svg.hashsalt": "flexmoe",
        "hatch.linewidth": 1.2,
        "axes.unicode_minus": False,
    }


def short(number: float) -> str:
    """Three figures that mean something: 0.860, 6.07, 24.6, 118, 182,255."""
    if number >= 1000:
        return f"{number:,.0f}"
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.yaxis.grid(visible=True, color=style.RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _colours(key: str) -> dict[str, Any]:
    hatch = {"hatch": "///", "edgecolor": style.PAPER} if key in style.CITED else {}
    return {"color": style.ENGINE_COLOURS.get(key, style.MUTED), **hatch}


# ---------------------------------------------------------------------------------------------- kinds


def _latency(axes: Any, panel: Panel, _: int) -> None:
    """Groups of bars, one a batch size; the floor is a line across each group."""
    batches = [point.x for point in panel.series[0].points]
    engines = [series for series in panel.series if series.key != "floor"]
    main = [point.value.number for one in panel.series if "hf" not in one.key for point in one.points]
    top = _CLIP * max(main)
    for place, batch in enumerate(batches):
        present = [(one, point) for one in engines for point in one.points if point.x == batch]
        width = min(0.32, 0.9 / max(1, len(present)))
        for number, (one, point) in enumerate(present):
            x = place + (number - (len(present) - 1) / 2) * width
            height = point.value.number
            axes.bar(x, height, width * 0.9, label=one.label, **_colours(one.key))
            _tell(axes, x, min(height, top), point, top, ours=one.key == "flexmoe")
        half = max(0.26, len(present) * width / 2)
        level = next(point.value.number for point in panel.series[0].points if point.x == batch)
        axes.plot([place - half, place + half], [level, level], color=style.INK, lw=3, solid_capstyle="butt")
    axes.set_ylim(0, top)
    axes.set_yticks([])
    axes.set_xlim(-0.6, max(len(batches), _LEAST_GROUPS) - 0.4)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches], color=style.INK)


def _tell(axes: Any, x: float, height: float, point: Point, top: float, *, ours: bool) -> None:
    """The value above a bar; inside ours the percentage of the floor; a cut bar's value at its head."""
    text = short(point.value.number)
    if point.value.number > top:
        axes.text(x, top * 0.985, text, ha="center", va="top", rotation=90, fontsize=11, color=style.INK,
                  bbox={"facecolor": style.PAPER, "edgecolor": "none", "pad": 1.5})  # fmt: skip
        return
    weight = "bold" if ours else "normal"
    axes.text(
        x, height + top * 0.012, text, ha="center", va="bottom", fontsize=11.5, fontweight=weight, color=style.INK
    )
    if ours and point.note is not None:
        words = f"{point.note.number:.0f}%"
        inside = height > 0.16 * top
        place = (height * 0.5, "center", style.PAPER) if inside else (height + top * 0.075, "bottom", style.OURS)
        axes.text(
            x, place[0], words, ha="center", va=place[1], fontsize=12, fontweight="bold", color=place[2],
            rotation=90 if inside else 0,
        )  # fmt: skip


def _experts(axes: Any, panel: Panel, _: int) -> None:
    """Lines from zero, so that flat looks flat. The legend names those that no title does."""
    places = {x: float(x) for one in panel.series for x in (point.x for point in one.points)}
    for one in panel.series:
        values = [point.value.number for point in one.points]
        colour = style.ENGINE_COLOURS.get(one.key, style.MUTED)
        label = one.label if len(panel.series) > 1 else None
        axes.plot([places[point.x] for point in one.points], values, "o-", lw=4, ms=9, color=colour, label=label)
        for end, point in ((0, one.points[0]), (-1, one.points[-1])):
            axes.annotate(
                short(point.value.number), (places[point.x], values[end]), (0, 11), textcoords="offset points",
                ha="center", fontweight="bold", color=style.INK,
            )  # fmt: skip
    axes.title.set_fontsize(12.5)
    highest = max(point.value.number for one in panel.series for point in one.points)
    axes.set_ylim(0, highest * 1.35)
    axes.margins(x=0.1)
    axes.set_xticks(sorted(set(places.values())), [str(int(x)) for x in sorted(set(places.values()))])
    axes.set_xlabel("experts in a layer", fontsize=12)
    axes.tick_params(labelsize=11)


def _pair(axes: Any, panel: Panel, _: int) -> None:
    """Two bars, ours first."""
    for place, one in enumerate(panel.series):
        value = one.points[0].value.number
        axes.bar(place, value, 0.72, label=one.label, **_colours(one.key))
        weight = "bold" if one.key == "flexmoe" else "normal"
        axes.text(place, value, short(value), ha="center", va="bottom", fontweight=weight, fontsize=14, color=style.INK)
    metric, unit = panel.title.rstrip(")").split(" (")
    axes.set_title(f"{_wrapped(metric)}, {unit}", loc="left", fontsize=12, color=style.INK)
    axes.set_ylim(0, 1.15 * max(one.points[0].value.number for one in panel.series))
    axes.set_yticks([])
    axes.set_xticks([0, 1], ["FlexMoE", "HF"], color=style.INK, fontsize=12)


def _wrapped(text: str) -> str:
    return text.replace(", ", ",\n").replace(" of 512", "\nof 512").replace(" to first", "\nto first")


def _bars(axes: Any, panel: Panel, column: int) -> None:
    """Horizontal bars of one series; names beside the first panel only."""
    points = panel.series[0].points[::-1]
    values = [point.value.number for point in points]
    colours = [_bar_colour(point.x) for point in points]
    axes.barh(range(len(points)), values, 0.66, color=colours, label=panel.series[0].label)
    for place, value in enumerate(values):
        axes.text(value, place, f" {short(value)}", va="center", fontweight="semibold", color=style.INK)
    axes.set_xlim(0, max(values) * 1.3)
    empty = max(0, _FEWEST_BARS - len(points)) / 2  # beside few bars, lest they fill the panel
    axes.set_ylim(-0.5 - empty, len(points) - 0.5 + empty)
    axes.set_xticks([])
    axes.yaxis.grid(visible=False)
    axes.set_yticks(range(len(points)), [point.x if column == 0 else "" for point in points], color=style.INK)
    axes.title.set_fontsize(12.5)


def _bar_colour(name: str) -> str:
    """By strategy, or ours and others'."""
    words = {
        "FlexMoE": style.OURS,
        "vLLM": style.ENGINE_COLOURS["vllm"],
        "tensor": style.OURS,
        "expert": style.LINK,
        "hybrid": style.ROUTER,
    }
    return next((colour for word, colour in words.items() if name.startswith(word)), style.ENGINE_COLOURS["hf-best"])


def _stack(axes: Any, panel: Panel, _: int) -> None:
    """Horizontal bars piled of operations; those that are wide enough bear their value."""
    names = list(dict.fromkeys(point.x for one in panel.series for point in one.points))[::-1]
    ends = dict.fromkeys(names, 0.0)
    total = max(
        sum(point.value.number for one in panel.series for point in one.points if point.x == name) for name in names
    )
    for one in panel.series:
        for point in one.points:
            width, place = point.value.number, names.index(point.x)
            label = one.label if point is one.points[0] else None
            colour = style.OPERATION_COLOURS.get(one.key, style.RULE)
            look = {"color": colour, "edgecolor": style.PAPER, "linewidth": 0.8}
            axes.barh(place, width, 0.62, left=ends[point.x], label=label, **look)
            if width > 0.055 * total:
                middle = ends[point.x] + width / 2
                axes.text(middle, place, short(width), ha="center", va="center", fontsize=11.5, color=style.PAPER)
            ends[point.x] += width
    axes.set_yticks(range(len(names)), [name.replace(", ", "\n") for name in names], color=style.INK)
    axes.yaxis.grid(visible=False)
    axes.set_xlim(0, total * 1.01)
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=11, handlelength=1.1)


def _spread(axes: Any, panel: Panel, column: int) -> None:
    """Groups of bars, one a batch size; a line at 1, the time of one GPU. Inside a bar the milliseconds.

    What takes much longer than one GPU is cut off, and says by how much.
    """
    batches = list(dict.fromkeys(point.x for one in panel.series for point in one.points))
    for at, batch in enumerate(batches):
        here = [(one, point) for one in panel.series for point in one.points if point.x == batch]
        width, narrow = 0.88 / max(2, len(here)), len(here) > 3
        for number, (one, point) in enumerate(here):
            x, ratio = at + (number - (len(here) - 1) / 2) * width, point.value.number
            axes.bar(x, ratio, width * 0.92, label=one.label, color=_bar_colour(one.key))
            times = f"{ratio:.2f}" if ratio < _HIGHEST else f"{ratio:.1f}"
            size = 8.5 if narrow else 11
            axes.text(
                x,
                min(ratio, _HIGHEST) + 0.02,
                times,
                ha="center",
                va="bottom",
                fontsize=size,
                color=style.INK,
                bbox={"facecolor": style.PAPER, "edgecolor": "none", "pad": 0.5} if ratio > _HIGHEST else None,
            )
            if point.note is not None:
                turned = {"rotation": 90, "fontsize": 8.5} if narrow else {"fontsize": 9.5}
                axes.text(x, 0.04, short(point.note.number), ha="center", color=style.PAPER, **turned)
    axes.axhline(1, color=style.INK, lw=1.5)
    highest = max(1.0, *(point.value.number for one in panel.series for point in one.points))
    axes.set_ylim(0, 1.12 * min(highest, _HIGHEST))
    axes.set_yticks([0, 0.5, 1], ["0", "½", "1"] if column == 0 else ["", "", ""])
    axes.set_xticks(range(len(batches)), batches, color=style.INK, fontsize=12)
    axes.set_xlabel("batch", fontsize=12)
    axes.title.set_fontsize(12.5)


def _legend_below(canvas: Any, axes: Any, lines_of: Mapping[str, str]) -> None:
    """Each name once, whichever panel has it; those of lines, with their colours, first."""
    import matplotlib.lines as lines

    named: dict[str, Any] = {name: lines.Line2D([], [], color=colour, lw=3) for name, colour in lines_of.items()}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if not named:
        return
    canvas.legend(named.values(), named.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=11.5,
                  handlelength=1.4, columnspacing=1.4)  # fmt: skip
