"""What a table is made of. Enters: Rows and their Values. Leaves: a Table, its texts, its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.report.figure import short_device
from flexmoe.report.rows import Row, Value

MISSING = "not recorded"


@dataclass(frozen=True, slots=True)
class Shown:
    """What stands in a table, and the number behind it if it is one."""

    text: str
    value: Value | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """about: hardware, versions and dates of its rows."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Shown, ...], ...]
    about: str


def markdown(table: Table) -> str:
    """As a page of docs shows it."""
    lines = [_line(table.header), _line(["---"] + ["---:"] * (len(table.header) - 1)), *map(_line, texts(table))]
    return "\n".join(lines) + f"\n\n{table.about}\n"


def texts(table: Table) -> list[list[str]]:
    """What is read in each row. Of several rows of one model, the first names it."""
    found = [[shown.text for shown in row] for row in table.rows]
    names = [row[0] for row in found]
    if table.name in ("latency", "first_tokens", "prompt_operations", "spread", "slices"):
        names = [name if name != before else "" for before, name in zip(["", *names], names, strict=False)]
    return [[name, *row[1:]] for name, row in zip(names, found, strict=True)]


def three(number: float) -> str:
    """Three significant figures, more for a thousand and above."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}" if number >= 1 else f"{number:.3f}"


def number(value: Value, form: str | None = None) -> Shown:
    """A number as `form` writes it, or with three figures."""
    return Shown(form.format(value.number) if form else three(value.number), value)


def percent(row: Row, path: str) -> Shown:
    """The percentage at this path, if it was recorded; else why not, if the row says so."""
    if row.get(path) is None:
        return Shown(str(row.get("result.floor_unknown") or MISSING))
    return number(row.value(path), "{:.0f}")


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def versions(row: Row) -> str:
    """Device and packages."""
    known = row.get("versions") or {}
    named = [f"{name} {known[name]}" for name in ("torch", "triton", "transformers") if known.get(name)]
    device = row.get("device.name") or row.get("device.cpu") or ""
    return f"{short_device(str(device))}; {', '.join(named)}."


def dates(rows: Sequence[Row]) -> str:
    """When, and at which commits."""
    days = sorted({str(row.get("time"))[:10] for row in rows})
    commits = list(dict.fromkeys(str(row.get("commit"))[:7] for row in rows if row.get("commit")))
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Measured {span}, {'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}." if commits else span
