"""Strategies side by side, on ranks of a CPU, on several GPUs, and by shares. Enters: Rows. Leaves: Figures, groups."""

from __future__ import annotations

from collections.abc import Sequence

from flexmoe.report.figure import MODELS, Figure, Panel, Point, Series, bar_panels, measured, short_device
from flexmoe.report.rows import Row, Value, newest

STRATEGIES = {
    "tensor": "tensor (intra-expert)",
    "expert, all-reduce": "expert, all-reduce",
    "expert, all-to-all": "expert, all-to-all",
    "hybrid, all-reduce": "hybrid, all-reduce",
    "hybrid, all-to-all": "hybrid, all-to-all",
    "data, experts spread": "data, experts spread",
}


def strategy_rows(rows: Sequence[Row]) -> list[Row]:
    """On the most ranks of a CPU, with the largest batch: the newest row of each strategy, in STRATEGIES' order."""
    found = [row for row in rows if row.get("benchmark") == "strategies" and row.get("result.sent_in_all") is not None]
    found = [row for row in found if row.get("device.kind") != "cuda"]
    if not found:
        return []
    ranks, batch = max((int(row.get("config.ranks")), int(row.get("params.batch"))) for row in found)
    found = [row for row in found if (row.get("config.ranks"), row.get("params.batch")) == (ranks, batch)]
    chosen = {row.get("config.strategy"): row for row in newest(found, ("config.strategy",))}
    return [chosen[name] for name in STRATEGIES if name in chosen]


def strategies(rows: Sequence[Row]) -> Figure | None:
    """What each strategy sends, how unevenly it loads its ranks, and how long a step took."""
    found = strategy_rows(rows)
    if not found:
        return None
    shown = {
        "result.sent_in_all": "bytes sent a token",
        "result.imbalance.step": "busiest rank / mean",
        "result.step_ms.median": "ms a step",
    }
    panels = bar_panels(found, shown, lambda row: STRATEGIES[row.get("config.strategy")])
    first = found[0]
    about = (
        f"{first.get('model.label')}, batch {first.get('params.batch')}, {first.get('config.ranks')} ranks over gloo"
    )
    about += f" on {first.get('device.cores')} shared CPU cores; {measured(first)}"
    return Figure("strategies", "bars", "", panels, about)


def shares(rows: Sequence[Row]) -> list[dict[tuple[str, int], Row]]:
    """What each rank's share of a MoE layer took alone: for each model and batch size, by strategy and degree."""
    found = [row for row in rows if row.get("benchmark") == "slices" and row.get("block.median")]
    groups: dict[tuple[str, int], dict[tuple[str, int], Row]] = {}
    for row in newest(found, ("model", "batch", "strategy", "degree")):
        of_batch = groups.setdefault((row.get("model"), row.get("batch")), {})
        of_batch[row.get("strategy"), row.get("degree")] = row
    return [groups[key] for key in sorted(groups, key=lambda key: key[1]) if ("tensor", 1) in groups[key]]


def spread_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(a strategy on several GPUs, one GPU in the same run), the largest model first: the newest of each."""
    steps = [row for row in rows if row.get("benchmark") == "strategies" and row.get("device.kind") == "cuda"]
    steps = [row for row in steps if row.get("engine") == "flexmoe" and row.get("result.step_ms.median")]
    alone = {(row.get("commit"), *_step(row)): row for row in steps if row.get("config.ranks") == 1}
    found = newest(
        [row for row in steps if row.get("config.ranks") > 1 and (row.get("commit"), *_step(row)) in alone],
        ("model.label", "config.ranks", "params.batch", "config.strategy"),
    )
    found.sort(key=lambda row: (-row.get("model.parameters"), *_step(row), row.get("config.ranks")))
    return [(row, alone[row.get("commit"), *_step(row)]) for row in found]


def _step(row: Row) -> tuple[str, int]:
    return str(row.get("model.label")), int(row.get("params.batch"))


def spread(rows: Sequence[Row]) -> Figure | None:
    """A step on the most GPUs that were measured, over the same step on one: each strategy at each batch size."""
    pairs = spread_pairs(rows)
    ranks = max((int(row.get("config.ranks")) for row, _ in pairs), default=0)
    pairs = [(row, alone) for row, alone in pairs if row.get("config.ranks") == ranks]
    if not pairs:
        return None
    panels = []
    for model in dict.fromkeys(str(row.get("model.label")) for row, _ in pairs):
        of_model = [(row, alone) for row, alone in pairs if row.get("model.label") == model]
        series = tuple(
            Series(
                strategy,
                f"{label} (inter-expert)" if strategy.startswith("expert") else label,
                tuple(
                    Point(str(row.get("params.batch")), _median(row).over(_median(alone)), _median(row))
                    for row, alone in of_model
                    if row.get("config.strategy") == strategy
                ),
            )
            for strategy, label in STRATEGIES.items()
        )
        panels.append(Panel(_name(model), tuple(one for one in series if one.points)))
    first = pairs[0][0]
    about = f"{ranks} × {short_device(str(first.get('device.name')))}, {first.get('params.dtype')}; in a bar, ms a step"
    return Figure("spread", "spread", "time of one GPU", tuple(panels), f"{about}; {measured(first)}")


def _median(row: Row) -> Value:
    return row.value("result.step_ms.median")


def _name(label: str) -> str:
    """Of a model, or of a part of its layers."""
    name, changed, rest = label.partition(" with ")
    return MODELS.get(name, name) + (f", {rest}" if changed else "")
