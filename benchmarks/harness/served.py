"""Loads on a server of the built-in model on this CPU. Enters: a trace, rounds. Leaves: rows of `flexmoe bench serve`.

In fp32, whose prompts the machine's table has as they are computed. Each row says how busy the machine was before it
and after: what others do there is in its times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexmoe.bench.endpoint import EndpointOptions
from flexmoe.bench.load import LoadOptions
from flexmoe.bench.serving import ServeOptions, measure
from harness.server import ServerProcess

_SECONDS = 40.0
_RATES = 1.0, 4.0  # requests a second
_SETTLE_SECONDS = 5.0


def loads(trace: Path | None) -> list[LoadOptions]:
    """Steady ones of two rates, and what a trace asks for with a fifth of its tokens, which this model has room for."""
    steady = [
        LoadOptions(rate=rate, duration=_SECONDS, input_len=(64, 192), output_len=(32, 64), seed=seed)
        for seed, rate in enumerate(_RATES, 1)
    ]
    return steady if trace is None else [*steady, LoadOptions(trace=trace, duration=_SECONDS, length_scale=0.2)]


def served_now(trace: Path | None, rounds: int) -> Iterator[dict[str, Any]]:
    """Each load so many times, by turns, on a server that has had a moment to start."""
    for number in range(rounds):
        with ServerProcess("--device", "cpu", "--dtype", "float32") as server:
            time.sleep(_SETTLE_SECONDS)
            for load in loads(trace):
                before = os.getloadavg()[0]
                row = measure(ServeOptions(endpoint=EndpointOptions(url=server.url), load=load)).row
                params = row["params"] | ({"trace": trace.name} if trace and load.trace else {})
                busy = {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}
                yield row | {"params": params, "round": number, "load_average": busy}
            server.stop()
