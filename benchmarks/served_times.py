"""TTFT and TPOT of a server whose steps take known times: foretold, with and without what a server adds, and measured.

The model is left out: a step takes as long as it is said to (`step_seconds`), on a clock, like one on a GPU of its own,
and the next is launched ahead. So neither the model nor the machine's table has a part in the errors, and other work on
the machine only a small one. What a server adds is measured first, as `flexmoe bench machine` does it; then loads are
played to the same server, and simulated.

    python benchmarks/served_times.py --rounds 3 --out benchmarks/results/cpu_served_times.jsonl [--trace trace.csv]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from harness.server import ServerProcess
from host_step import HostRunner, KnownFlight

from flexmoe.bench.endpoint import EndpointOptions
from flexmoe.bench.load import LoadOptions, lengths
from flexmoe.bench.machine_serving import ask
from flexmoe.bench.record import append, facts
from flexmoe.bench.serving import ServeOptions, measure
from flexmoe.config.engine import EngineConfig, SchedulerConfig
from flexmoe.config.server import ServerConfig, usual_chunk_rate
from flexmoe.config.serving import Serving
from flexmoe.engine.engine import Engine
from flexmoe.engine.sampler import SampleOutput
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.planner.replica import EngineLimits, Served
from flexmoe.planner.simulator import Fleet, simulate
from flexmoe.scheduling.step import Step
from flexmoe.server import run

_CONTEXT, _SEATS, _TOKENS = 1024, 64, 2048
_MEASURE_SECONDS, _LOAD_SECONDS = 15.0, 20.0
_RATES = 1.0, 4.0, 12.0  # requests a second


def step_seconds(step: Step) -> float:
    """Like OLMoE's on an H200: decodes 1.5 ms and 20 us a row; prompts beside them 5 ms and 5 us a token."""
    prompts = step.num_tokens - step.num_decodes
    decodes = 1.5e-3 + 2e-5 * step.num_decodes if step.num_decodes else 0.0
    return decodes + (5e-3 + 5e-6 * prompts if prompts else 0.0)


@dataclass(frozen=True, slots=True)
class TimedFlight:
    """A step that is over at a known moment, of `time.monotonic()`."""

    known: KnownFlight
    over: float

    @property
    def step(self) -> Step:
        return self.known.step

    def wait(self) -> SampleOutput:
        time.sleep(max(0.0, self.over - time.monotonic()))
        return self.known.wait()


class TimedRunner(HostRunner):
    """Lays steps out, and lets a device that computes one after the other take its time for each."""

    mixes_ahead = True
    _free = 0.0  # when the device is done with all that was launched

    def launch(  # type: ignore[override]
        self, step: Step, states: Sequence[SamplingState], *, after: TimedFlight | None = None
    ) -> TimedFlight:
        known = super().launch(step, states, after=None if after is None else after.known)
        self._free = max(self._free, time.monotonic()) + step_seconds(step)
        return TimedFlight(known, self._free)


def timed_engine(options: Mapping[str, Any]) -> Engine:
    """The built-in model's engine without its model."""
    engine = Engine(EngineConfig.from_options(options))
    engine.runner = TimedRunner(_CONTEXT // engine.options.cache.block_size + 1)  # type: ignore[assignment]
    return engine


def serve() -> int:
    """The server's process. Streams may be as many as with a model on a GPU, which needs none of these cores."""
    run.make_engine = timed_engine
    options = {"device": "cpu", "threads": 1, "max_num_seqs": _SEATS, "max_num_batched_tokens": _TOKENS}
    config = ServerConfig(port=0, max_chunk_rate=usual_chunk_rate("cuda"), expert_interval=0.0)
    return run.serve(options, config, lambda _, url: print(f"Serving at {url}", file=sys.stderr, flush=True))


def foretold(load: LoadOptions, engine: Mapping[str, Any], serving: Serving | None) -> list[Served]:
    """The load's requests on such an engine. serving: None for the engine alone."""
    names = "max_num_seqs", "max_num_batched_tokens", "max_model_len"
    limits = EngineLimits(
        scheduler=SchedulerConfig(**{name: engine[name] for name in names}), num_blocks=engine["kv_cache_blocks"],
        block_size=engine["block_size"], prefix_caching=engine["prefix_caching"], ahead=engine["prompts_ahead"],
        serving=serving, chunk_rate=usual_chunk_rate("cuda"),
    )  # fmt: skip
    fit = [request for request in lengths(load) if request.input_len < limits.longest]
    return simulate(Fleet(limits, step_seconds, 1, 1, 1), fit).served


def figures(served: Sequence[Served]) -> dict[str, float]:
    """Milliseconds, mean and median."""
    ttft, tpot = [1e3 * one.ttft for one in served], [1e3 * one.tpot for one in served if one.tpot is not None]
    return {
        "ttft_mean": fmean(ttft), "ttft_p50": median(ttft), "tpot_mean": fmean(tpot), "tpot_p50": median(tpot)
    }  # fmt: skip


def loads(trace: Path | None) -> list[LoadOptions]:
    """Steady ones, and a trace with a fifth of its tokens, which the context has room for."""
    steady = [
        LoadOptions(rate=rate, duration=_LOAD_SECONDS, input_len=(64, 192), output_len=(32, 96), seed=seed)
        for seed, rate in enumerate(_RATES, 1)
    ]
    return steady if trace is None else [*steady, LoadOptions(trace=trace, duration=_LOAD_SECONDS, length_scale=0.2)]


def compare(url: str, load: LoadOptions, serving: Serving) -> dict[str, Any]:
    """A load, played and foretold."""
    before = os.getloadavg()[0]
    row = measure(ServeOptions(endpoint=EndpointOptions(url=url), load=load)).row
    result, engine = row["result"], row["config"]["engine"]
    measured = {f"{name}_{key}": result[f"{name}_ms"][key] for name in ("ttft", "tpot") for key in ("mean", "p50")}
    expected = {
        "server": figures(foretold(load, engine, serving)),
        "engine alone": figures(foretold(load, engine, None)),
    }
    params = {**row["params"], "trace": load.trace and load.trace.name}
    busy = {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}
    found = {"requests": result["requests"], "succeeded": result["succeeded"], "measured_ms": measured}
    about = {"benchmark": "served_times", "engine": "flexmoe", "params": params, "load_average": busy}
    return about | {"serving": serving.to_json(), "result": found | {"predicted_ms": expected}}


def show(row: dict[str, Any]) -> None:
    """A line for each figure: measured, and how far predictions are off."""
    params, result = row["params"], row["result"]
    name = params["trace"] or f"{params['rate']:g} requests/s"
    print(f"{name}, {result['succeeded']} of {result['requests']} answered, load average {row['load_average']}")
    for key, measured in result["measured_ms"].items():
        off = ", ".join(
            f"{what} {told[key]:.2f} ({told[key] / measured - 1:+.1%})" for what, told in result["predicted_ms"].items()
        )
        print(f"  {key}: {measured:.2f} ms; {off}")


def main() -> None:
    """Print, and append rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=1, help="how often each load is played")
    parser.add_argument("--trace", type=Path, help="a recorded trace, too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--server", action="store_true", help="be the server")
    args = parser.parse_args()
    if args.server:
        sys.exit(serve())
    with ServerProcess(command=(sys.executable, __file__, "--server")) as server:
        for number in range(args.rounds):
            serving = asyncio.run(ask(server.url, _MEASURE_SECONDS))
            print(serving.to_json())
            for load in loads(args.trace):
                row = compare(server.url, load, serving) | {"round": number} | facts()
                show(row)
                if args.out:
                    append(args.out, row)
        server.stop()


if __name__ == "__main__":
    main()
