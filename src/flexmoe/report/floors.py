"""How near to the floor a row is, in every row of a table. Enters: Rows. Leaves: what a table shows, Values in it.

What was recorded is shown as it is. Where nothing was, the floor is computed from the row (`planner/recorded.py`) and
the speed of its device: the data sheet's if the row is cited and says so, else what was measured for the machine file
that comes with the package. Such percentages bear a star, unless all of a table are computed, from counted experts.
Where a row does not tell enough, the reason stands there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from flexmoe.config.machine import machine_text, shipped_machines
from flexmoe.planner.recorded import (
    UNKNOWN_MACHINE,
    Needs,
    NoFloorError,
    served_needs,
    slice_needs,
    step_needs,
)
from flexmoe.report.rows import Row, Value
from flexmoe.report.table import MISSING, Shown, percent

STAR = "*"
_READ = "device.read_gb_s"
_PER_SECOND = {"ms": 1e3, "us": 1e6}


def step_percent(row: Row, took: str) -> Shown:
    """Of a decode step. took: the path of its milliseconds."""
    return _shown(row, "percent_of_floor", took, "ms", step_needs, _speeds(row))


def slice_percent(row: Row) -> Shown:
    """Of a rank's share of a MoE layer, whose experts were counted: without a star."""
    shown = _shown(row, "percent_of_floor", "block.median", "us", slice_needs, _speeds(row))
    return Shown(shown.text.removesuffix(STAR), shown.value)


def served_percents(row: Row, machines: Mapping[str, str]) -> tuple[Shown, Shown]:
    """Of a first token and of one after it, both on average. machines: on which a server ran, by commit."""
    name = machines.get(str(row.get("commit")))
    speeds = None if name is None else _machine(name)
    parts = (
        ("percent_of_first_token_floor", "result.ttft_ms.mean", lambda data: served_needs(data).first),
        ("percent_of_floor", "result.tpot_ms.mean", lambda data: served_needs(data).token),
    )
    first, token = (_shown(row, key, took, "ms", needs, speeds) for key, took, needs in parts)
    return first, token


def servers(rows: Sequence[Row]) -> dict[str, str]:
    """The machine on which servers ran, by commit: facts told of rows that know their client's machine alone."""
    return {str(row.get("commit")): str(row.get("machine")) for row in rows if row.get("benchmark") == "served_on"}


def explained(lines: Sequence[Sequence[Shown]], about: str) -> str:
    """The text below a table, which says what a star means if there is one."""
    if not any(shown.text.endswith(STAR) for line in lines for shown in line):
        return about
    return f"{about} {STAR}: computed afterwards, of model, lengths and the device's speed; uniform routing assumed."


def _shown(
    row: Row, key: str, took: str, unit: str, needs: Callable[[Mapping[str, Any]], Needs], speeds: Row | None
) -> Shown:
    if row.get(f"result.{key}") is not None or row.get("result.floor_unknown"):
        return percent(row, f"result.{key}")
    try:
        needed = needs(row.data)
    except NoFloorError as error:
        return Shown(str(error))
    except KeyError:
        return Shown(MISSING)
    if speeds is None:
        return Shown(UNKNOWN_MACHINE)
    product = f"device.tflops.{row.get('config.engine.dtype')}"
    value = _percent(row.value(took), needed, speeds, product, _PER_SECOND[unit])
    return Shown(f"{value.number:.0f}{STAR}", value)


def _percent(took: Value, needed: Needs, speeds: Row, product: str, per_second: float) -> Value:
    """100 x floor / took, as a formula of both cells: GB/s or TFLOP/s is b, what the model needs a plain number.

    product: where the TFLOP/s stand. Without them reading alone counts, which only lowers the floor.
    """
    ways = [(needed.bytes, _READ, 1e9), (needed.flops, product, 1e12)]
    parts = [
        (amount, speeds.value(path), unit / per_second) for amount, path, unit in ways if amount and speeds.get(path)
    ]
    amount, speed, unit = max(parts, key=lambda part: part[0] / (part[1].number * part[2]))
    number = 100 * amount / (needed.devices * speed.number * unit) / took.number
    return Value(number, took.cells + speed.cells, f"100 * {amount} / ({needed.devices} * b * {unit:.0f}) / a")


def _speeds(row: Row) -> Row | None:
    """Where the speed of a row's device stands: in the row, or in the file of a machine that was measured in full."""
    if row.get(_READ) is not None:
        return row
    machines = map(_machine, shipped_machines())
    same = (one for one in machines if one.get("device.name") == row.get("device.name") and not one.get("extrapolated"))
    return next(same, None)


@cache
def _machine(name: str) -> Row:
    """A machine file as one row, of line 0: it is a whole file, not a line of one."""
    return Row(name, 0, json.loads(machine_text(name)))
