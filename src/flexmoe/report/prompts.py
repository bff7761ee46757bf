"""Where the time of a prompt goes on a GPU. Enters: rows of benchmarks/prefill.py. Leaves: a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexmoe.report.figure import MODELS
from flexmoe.report.rows import Row, newest
from flexmoe.report.table import Shown, Table, dates, number, versions

_TOKENS = 2048
_NAMES = {
    "gate_up": "experts, gate and up", "down": "experts, down", "attention": "attention", "qkv": "QKV",
    "output": "output projection", "norm": "sums and norms", "rotate": "rotation, cache", "router": "router",
    "group": "top-k, grouping", "head": "head, once",
}  # fmt: skip


def prompt_operations(rows: Sequence[Row]) -> Table | None:
    """Each operation of a layer for 2,048 tokens, beside what the card's products and memory allow."""
    found = [row for row in rows if row.get("benchmark") == "prefill" and row.get("params.tokens") == _TOKENS]
    found = sorted(newest(found, ("model", "device.name")), key=lambda row: _order(str(row.get("model"))))
    lines = tuple(line for row in found for line in _lines(row))
    header = (
        "model",
        "operation",
        "µs a layer",
        "floor, µs",
        "% of floor",
        "TFLOP/s",
        "% of a product",
        "% of reading",
    )
    if not found:
        return None
    about = f"A prompt of {_TOKENS:,} tokens, kernels alone. Floor: products at the rate of a large one of torch "
    about += "or bytes at that of a plain read, whichever takes longer. "
    about += f"{versions(found[0])} {dates(found)}"
    return Table("prompt_operations", "Where a prompt's time goes", header, lines, about)


def _order(model: str) -> int:
    return list(MODELS).index(model) if model in MODELS else len(MODELS)


def _lines(row: Row) -> list[tuple[Shown, ...]]:
    operations: dict[str, dict[str, Any]] = row.get("result.operations")
    names = sorted((name for name in operations if name in _NAMES), key=lambda name: -operations[name]["us"])
    return [_line(row, f"result.operations.{name}", _NAMES[name]) for name in names]


def _line(row: Row, path: str, name: str) -> tuple[Shown, ...]:
    took, floor = row.value(f"{path}.us"), row.value(f"{path}.floor_us")
    model, product = str(row.get("model")), row.value(f"{path}.tflop_s")
    none = Shown("")  # what multiplies no matrices has no share of a product's rate
    return (
        Shown(MODELS.get(model, model)),
        Shown(name),
        number(took),
        number(floor),
        number(floor.over(took), "{:.0%}"),
        number(product) if product.number else none,
        number(row.value(f"{path}.product"), "{:.0f}") if product.number else none,
        number(row.value(f"{path}.read"), "{:.0f}"),
    )
