"""The parts of a figure, and what models and engines are called in all of them. Leaves: frozen dataclasses, names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flexmoe.report.rows import Row, Value

ENGINES = {
    "floor": "roofline: memory's own time",
    "flexmoe": "FlexMoE",
    "vllm": "vLLM 0.24 (cited)",
    "hf-best": "transformers, best setup",
    "hf-default": "transformers, as it comes",
    "hf-best cited": "transformers, best (cited)",
    "hf-default cited": "transformers, default (cited)",
    "flexflow-course": "FlexFlow Serve, course project (cited)",
}
MODELS = {"mixtral-8x7b": "Mixtral-8x7B", "qwen3-30b-a3b": "Qwen3-30B-A3B", "olmoe-1b-7b": "OLMoE-1B-7B"}


@dataclass(frozen=True, slots=True)
class Point:
    """x: a category or a number on the axis. note: written beside the value, also a Value (percent of the floor)."""

    x: str
    value: Value
    note: Value | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """key: decides the colour; an engine or an operation."""

    key: str
    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """kind: which function of draw.py draws it. unit: of the values. about: device and dates, below the figure."""

    name: str
    kind: str
    unit: str
    panels: tuple[Panel, ...]
    about: str


def bar_panels(rows: Sequence[Row], shown: Mapping[str, str], name_of: Callable[[Row], str]) -> tuple[Panel, ...]:
    """A panel of bars for each key of the rows that is shown, under its title; a bar a row."""
    return tuple(
        Panel(title, (Series("flexmoe", title, tuple(Point(name_of(row), row.value(key)) for row in rows)),))
        for key, title in shown.items()
    )


def model_name(row: Row, key: str = "model.label") -> str:
    """Of the row's model: as its makers write it, if it is one that we know."""
    label = str(row.get(key))
    return MODELS.get(label, label)


def short_device(name: str) -> str:
    """Without the signs that makers add."""
    return name.replace("(R)", "").replace("(TM)", "").replace(" Processor", "").strip()


def measured(row: Row) -> str:
    """When, and of which commit."""
    words = f"measured {str(row.get('time'))[:10]}"
    return f"{words}, commit {str(row.get('commit'))[:7]}" if row.get("commit") else words
