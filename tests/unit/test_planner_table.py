"""The tables in docs/planner.md are what tools/planner_table.py writes. 8 and 64 GPUs take a minute: only counted."""

from __future__ import annotations

import pytest

from tools.planner_table import BEGIN, END, GPUS, MACHINES, MODELS, PAGE, rows, stale


def tables() -> str:
    page = PAGE.read_text(encoding="utf-8")
    return page[page.index(BEGIN) : page.index(END)]


@pytest.mark.parametrize("link", MACHINES)
def test_plans_for_few_gpus_are_current(link: str) -> None:
    section = tables().partition(f"**{link}**")[2]
    old = [line for line in rows(link, (1, 2, 4)) if line not in section]
    assert not old, "run `make planner-docs`"


def test_every_model_has_a_plan_for_every_number_of_gpus() -> None:
    lines = tables().splitlines()
    for name in MODELS.values():
        for gpus in GPUS:
            found = [line for line in lines if line.startswith(f"| {name} | {gpus} | ")]
            assert len(found) == len(MACHINES)
            assert all(line.count(" | ") == 7 for line in found)


def test_other_tables_are_stale() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert not stale(page, tables())
    assert stale(page, tables().replace("Mixtral", "Mistral"))
