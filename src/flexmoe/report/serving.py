"""The table of servers under load. Enters: Rows of `flexmoe bench serve`. Leaves: a Table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from flexmoe.report.figure import ENGINES, model_name
from flexmoe.report.floors import explained, served_percents, servers
from flexmoe.report.rows import Row, newest
from flexmoe.report.table import Shown, Table, dates, number

_LOAD = (
    "rate", "trace", "time_scale", "length_scale", "duration", "num_requests", "input_len", "output_len", "text",
    "prompts", "concurrency",
)  # fmt: skip
_SAME = ("config.engine.device", "engine", "model.name", *(f"params.{name}" for name in _LOAD), "note")


def served(rows: Sequence[Row]) -> Table | None:
    """Each load that a server was put under, the newest row of each. A row's device is its client's: left out."""
    found = [row for row in rows if row.get("benchmark") == "serve" and row.get("result.tpot_ms.p50")]
    found = newest(found, _SAME)
    if not found:
        return None
    machines = servers(rows)
    lines = tuple(_line(row, machines) for row in sorted(found, key=lambda row: str(row.get("model.name"))))
    header = (
        "model", "engine", "device", "load", "tokens/s", "first token, ms", "its p99", "its % of floor", "a token, ms",
        "p99 of gaps, ms", "% of floor",
    )  # fmt: skip
    about = (
        "Medians, unless a percentile is named. Floor of a token: a step of as many sequences as decoded together on "
        "average, at least one; of a first token: the average prompt, alone; experts all as likely. Both stand "
        "against mean times. "
        f"{dates(found)}"
    )
    return Table("served", "Served over HTTP", header, lines, explained(lines, about))


def _line(row: Row, machines: Mapping[str, str]) -> tuple[Shown, ...]:
    first_percent, token_percent = served_percents(row, machines)
    return (
        Shown(model_name(row, "model.name")),
        Shown(ENGINES.get(str(row.get("engine")), str(row.get("engine")))),
        Shown(str(row.get("config.engine.device") or "")),
        Shown(_load(row)),
        *(number(row.value(f"result.{key}")) for key in ("output_tokens_per_s", "ttft_ms.p50", "ttft_ms.p99")),
        first_percent,
        *(number(row.value(f"result.{key}")) for key in ("tpot_ms.p50", "itl_ms.p99")),
        token_percent,
    )


def _load(row: Row) -> str:
    trace, duration, note = row.get("params.trace"), row.get("params.duration"), row.get("note")
    lengths = f"{_range(row.get('params.input_len'))} + {_range(row.get('params.output_len'))} tokens"
    if trace:  # as words, which can be broken between lines
        load = PurePath(trace).stem.replace("_", " ") + (f", {duration:g} s" if duration else "")
        if (scale := row.get("params.time_scale") or 1) != 1:
            load += f", {1 / scale:.3g} times as fast"
    elif rate := row.get("params.rate"):
        load = f"{rate:g} requests a second of {lengths}"
    else:
        load = f"{row.get('params.concurrency')} streams of {lengths}"
    return load + (f"; {note}" if note else "")


def _range(lengths: Sequence[int]) -> str:
    return "-".join(str(length) for length in dict.fromkeys(lengths))
