"""figures: a simulation in numbers. Enters: what was simulated. Leaves: one row a point, as JSON holds it.

Rates and throughput are of all replicas, also where only some were simulated. Keys are those of `flexmoe bench serve`
where it has them, so that simulated and measured rows can be drawn together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmoe.errors import ConfigError
from flexmoe.planner.replica import Served
from flexmoe.planner.simulator import Fleet, Simulated

PERCENTILES = (50, 90, 95, 99)
MEASURED, PREDICTED, EXTRAPOLATED = "measured", "prediction", "extrapolation"


@dataclass(frozen=True, slots=True)
class Point:
    """One simulation, or one measurement. Milliseconds and tokens a second.

    kind: "measured"; "prediction" where the machine's tables and at least as many GPUs were measured; "extrapolation"
    past them. kv_used: largest share of a KV cache. imbalance: of the busiest rank's experts, largest over mean.
    serving: whether TTFT and TPOT hold what an HTTP server adds; None of a measurement.
    """

    kind: str
    gpus: int
    rate: float
    ttft_ms: Mapping[str, float]
    tpot_ms: Mapping[str, float]
    output_tokens_per_s: float
    requests: int = 0
    replicas: int = 1
    simulated: int = 1
    plan: str = ""
    within_slo: float | None = None
    kv_used: float | None = None
    waiting: int | None = None
    busy: float | None = None
    preemptions: int | None = None
    cut_tokens: int = 0
    imbalance: float | None = None
    steps: int | None = None
    serving: bool | None = None


def point(
    fleet: Fleet, done: Simulated, kind: str, imbalance: float, slo_ms: tuple[float | None, float | None]
) -> Point:
    """The figures of a simulation. slo_ms: TTFT and TPOT within which an answer is good."""
    served, scale = done.served, fleet.replicas / fleet.simulated
    tpots = [tpot for tpot in (one.tpot for one in served) if tpot is not None]
    span = max(served[-1].arrival, 1e-9)
    return Point(
        kind=kind, gpus=fleet.gpus, rate=scale * len(served) / span, requests=len(served), replicas=fleet.replicas,
        simulated=fleet.simulated, ttft_ms=_percentiles([one.ttft for one in served]), tpot_ms=_percentiles(tpots),
        output_tokens_per_s=scale * sum(one.output_len for one in served) / done.end,
        within_slo=sum(_is_good(one, slo_ms) for one in served) / len(served) if any(slo_ms) else None,
        kv_used=max(done.line.kv_used), waiting=max(done.line.waiting), busy=done.busy, preemptions=done.preemptions,
        cut_tokens=sum(one.cut for one in served), imbalance=imbalance, steps=done.steps,
        serving=fleet.limits.serving is not None,
    )  # fmt: skip


def measured_points(rows: Iterable[Mapping[str, Any]], gpus: int) -> list[Point]:
    """Rows of `flexmoe bench serve --out`, of a server on so many GPUs. Raises ConfigError for other rows."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            result = row["result"]
            rate = float(row["params"].get("rate") or result["requests_per_s"])
            times = [{key: float(value) for key, value in result[name].items()} for name in ("ttft_ms", "tpot_ms")]
            found.append(Point(MEASURED, gpus, rate, times[0], times[1], float(result["output_tokens_per_s"])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"measured row {number} is not one that `flexmoe bench serve --out` writes: {error!r}."
            ) from error
    return found


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = np.asarray(seconds) * 1e3
    return {"mean": float(values.mean())} | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def _is_good(served: Served, slo_ms: tuple[float | None, float | None]) -> bool:
    ttft, tpot = slo_ms
    return (ttft is None or served.ttft * 1e3 <= ttft) and (tpot is None or (served.tpot or 0.0) * 1e3 <= tpot)
