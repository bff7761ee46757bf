"""Every row of every table of docs/performance.md and of the report says how near to its floor it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from flexmoe.planner.recorded import UNKNOWN_MACHINE, UNKNOWN_MODEL
from flexmoe.report.rows import Row
from flexmoe.report.table import Table
from flexmoe.report.tables import tables
from tests.docs.snippets import ROOT
from tools.performance_page import recorded

# Cited from a source that does not name its GPU, of which alone there is nothing to compute.
WITHOUT = {("published", "GPU not told")}


def lacking(rows: Sequence[Row]) -> list[str]:
    """Tables without a column of floors, and cells of such columns without a number."""
    return [f"{table.name}: {what}" for table in tables(rows) for what in _lacking(table)]


def _lacking(table: Table) -> list[str]:
    columns = [index for index, name in enumerate(table.header) if "% of floor" in name]
    cells = [row[index] for row in table.rows for index in columns]
    without = [cell.text for cell in cells if cell.value is None and (table.name, cell.text) not in WITHOUT]
    return without if columns else ["no column"]


def changed(benchmark: str, **fields: Any) -> list[Row]:
    """All rows, and one of this benchmark once more, newer than all, with other fields and no floor."""
    rows = recorded()
    of_kind = [row for row in rows if row.get("benchmark") == benchmark and row.get("config.ranks") != 1]
    row = next(row for row in reversed(of_kind) if row.get("result.step_ms") or row.get("result.tpot_ms"))
    data: dict[str, Any] = json.loads(json.dumps(row.data | {"time": "2099-01-01"} | fields))
    for name in ("floor_ms", "percent_of_floor"):
        data["result"].pop(name, None)
    return [*rows, replace(row, data=data)]


def test_no_row_is_without_its_floor() -> None:
    rows = recorded()
    assert {table.name for table in tables(rows)} >= {
        "latency", "latency_elsewhere", "first_tokens", "prompt_operations", "throughput", "spread", "slices",
        "experts", "cpu", "llama_cpp", "served", "published",
    }  # fmt: skip
    assert lacking(rows) == []


@pytest.mark.parametrize(
    ("benchmark", "fields", "said"),
    [
        ("strategies", {"device": {"kind": "cuda", "name": "A GPU"}}, UNKNOWN_MACHINE),
        ("serve", {"commit": "of a server whose machine nobody told"}, UNKNOWN_MACHINE),
        ("serve", {"config": {"engine": None}}, UNKNOWN_MODEL),
    ],
)
def test_a_row_without_a_floor_is_found(benchmark: str, fields: dict[str, Any], said: str) -> None:
    assert any(what.endswith(said) for what in lacking(changed(benchmark, **fields)))


def test_the_report_shows_the_same_tables() -> None:
    template = (ROOT / "src" / "flexmoe" / "report" / "templates" / "report.typ").read_text(encoding="utf-8")
    assert all(f'"{table.name}"' in template for table in tables(recorded()))
    assert "one.rows.flatten()" in template, "whole"
