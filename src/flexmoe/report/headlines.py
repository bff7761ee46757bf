"""The few large numbers on top. Enters: Rows. Leaves: Headlines, those that the rows can fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexmoe.report.charts import cpu_pairs, experts, latency_groups
from flexmoe.report.figure import MODELS, short_device
from flexmoe.report.rows import Row, Value


@dataclass(frozen=True, slots=True)
class Headline:
    """big: the number as written. values: what it is made of."""

    big: str
    small: str
    values: tuple[Value, ...]


def headlines(rows: Sequence[Row]) -> list[Headline]:
    """At most four."""
    makers: tuple[Callable[[Sequence[Row]], Headline | None], ...] = (_floor, _vllm, _flat, _cpu)
    return [headline for make in makers if (headline := make(rows)) is not None]


def _floor(rows: Sequence[Row]) -> Headline | None:
    measured = [
        (model, row) for model, group in latency_groups(rows) for row in group if row.get("engine") == "flexmoe"
    ]
    singles = [(model, row) for model, row in measured if row.get("params.batch") == 1] or measured
    if not singles:
        return None
    model, row = max(singles, key=lambda pair: float(pair[1].get("result.percent_of_floor")))
    value = row.value("result.percent_of_floor")
    words = f"of what memory allows: {MODELS.get(model, model)}, batch {row.get('params.batch')}"
    return Headline(f"{value.number:.0f}%", f"{words}, on {short_device(str(row.get('device.name')))}", (value,))


def _vllm(rows: Sequence[Row]) -> Headline | None:
    ratios: dict[tuple[str, int], Value] = {}
    for model, group in latency_groups(rows):
        ours = {row.get("params.batch"): row for row in group if row.get("engine") == "flexmoe"}
        for row in group:
            batch = row.get("params.batch")
            if row.get("engine") == "vllm" and batch in ours:
                ratios[model, batch] = row.value("result.ms").over(ours[batch].value("result.ms"))
    if not ratios:
        return None
    least, most = min(ratios.values(), key=_of), max(ratios.values(), key=_of)
    models, batches = {model for model, _ in ratios}, [batch for _, batch in ratios]
    small = f"as fast a decode step as vLLM 0.24 (cited): {len(models)} model{'s' * (len(models) > 1)}"
    small += f", batch {min(batches)} to {max(batches)}" if len(batches) > 1 else f", batch {batches[0]}"
    big = f"{least.number:.2f}×" if least is most else f"{least.number:.2f}–{most.number:.2f}×"
    return Headline(big, small, (least,) if least is most else (least, most))


def _flat(rows: Sequence[Row]) -> Headline | None:
    figure = experts(rows)
    if figure is None:
        return None
    points = next((one.points for one in figure.panels[-1].series if one.key == "flexmoe"), ())
    points = tuple(point for point in points if point.x != "1")  # where a token cannot choose two
    if len(points) < 2:
        return None
    grown = points[-1].value.over(points[0].value)
    small = f"the time a token with {points[-1].x} experts in a layer instead of {points[0].x}: flat"
    return Headline(f"{grown.number:.2f}×", small, (grown,))


def _cpu(rows: Sequence[Row]) -> Headline | None:
    for metric, ours, theirs in cpu_pairs(rows):
        if metric == "decode_bs1":
            ratio = theirs.value("median").over(ours.value("median"))
            small = f"as fast as transformers' best setup on {ours.get('device.cores')} CPU cores, one sequence"
            return Headline(f"{ratio.number:.1f}×", small, (ratio,))
    return None


def _of(value: Value) -> float:
    return value.number
