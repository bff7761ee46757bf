"""`flexmoe simulate`: what a plan would give a workload, request by request. Leaves: a table, rows, and curves."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexmoe.cli.files import OUTPUT, text_of
from flexmoe.cli.options import debug_option, numbers
from flexmoe.cli.planning import (
    limits_of,
    setting_of,
    setting_options,
    times_of,
    wide_console,
    workload_of,
    workload_options,
)  # fmt: skip
from flexmoe.cli.terminal import note, several
from flexmoe.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from flexmoe.planner.figures import Point
    from flexmoe.planner.planning import Setting
    from flexmoe.planner.workload import Workload

_MINUTES_DRAWN = 600.0  # seconds of requests where nothing says how many
_positive, _above_zero = click.IntRange(min=1), click.FloatRange(min=0, min_open=True)


def _gpus(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    return () if value is None else numbers(ctx, parameter, value)


def _rates(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...]:
    words = [] if value is None else [word.strip() for word in value.split(",")]
    if not all(re.fullmatch(r"\d+(\.\d+)?", word, re.ASCII) and float(word) > 0 for word in words):
        raise click.BadParameter(f"{value!r} is not a list of positive numbers; use for instance 1,2.5,8.")
    return tuple(map(float, words))


@click.command(short_help="Serve a workload on a machine that need not be there.")
@click.argument("model", required=False)
@setting_options
@click.option(
    "--plan", "plan_file", default="auto", show_default=True, metavar="auto|FILE", help="A plan's file, or the best."
)
@click.option("--gpus", callback=_gpus, help="Devices, as 8 or 1,2,4,8: a point each.  [default: the machine's]")
@click.option("--rates", callback=_rates, help="Requests a second, as 1,2,4: a point each.")
@click.option(
    "--rate-per-gpu", type=_above_zero, help="Requests a second for each device, for points of several sizes."
)
@workload_options
@click.option(
    "--exact-tokens",
    type=_positive,
    default=10_000_000,
    show_default=True,
    help="Output tokens up to which all replicas are simulated; of more, some replicas with their share.",
)
@click.option(
    "--measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Rows of `flexmoe bench serve --out`, to be shown beside.",
)
@click.option("--measured-gpus", type=_positive, default=1, show_default=True, help="Devices of that server.")
@click.option("--plot", type=OUTPUT, help="Draw curves into a PNG or SVG (needs the extra [report]).")
@click.option("--out", type=OUTPUT, help="File to append a JSON row a point to.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@debug_option
def simulate(model: str | None, **options: Any) -> None:
    """Serve a workload by MODEL on a machine that need not be there.

    The engine's own scheduler runs on a virtual clock; a table of the machine says how long a step takes. Engines that
    are alike share the requests through a router. Points for more GPUs than were measured are called extrapolation.

    \b
    Examples:
      flexmoe simulate mixtral-8x7b --machine h100x8 --gpus 4 --rates 1,2,4,8
      flexmoe simulate olmoe-1b-7b --machine h200x64 --gpus 1,8,64,1024 --trace trace.csv --plot curves.png
    """
    began = time.perf_counter()
    setting = setting_of(model, options)
    workload = workload_of(options)
    if not (workload.trace or workload.duration or workload.num_requests):
        workload = replace(workload, duration=_MINUTES_DRAWN)
    points = [*_measured(options), *_simulated(setting, workload, options)]
    if options["out"] is not None:
        _append(options["out"], points)
    if options["as_json"]:
        click.echo(json.dumps([asdict(point) for point in points], indent=2))
    else:
        _print(points, setting, time.perf_counter() - began)
    if options["plot"] is not None:
        from flexmoe.report.simulation import draw

        draw(points, options["plot"], f"{setting.name} on {setting.machine.name}")


def _simulated(setting: Setting, workload: Workload, options: dict[str, Any]) -> list[Point]:
    """A point for each number of devices and each rate."""
    points = []
    for gpus in options["gpus"] or (setting.machine.num_devices,):
        sized = setting.resized(gpus)
        own = options["rate_per_gpu"]
        rates: Sequence[float | None] = options["rates"] or ((own * gpus) if own else workload.rate,)
        for rate in rates:
            asked = replace(workload, rate=rate)
            note(f"{several(gpus, 'GPU')}{f', {rate:g} requests/s' if rate else ''}: simulating")
            candidate = sized.candidate(options["plan_file"], asked, limits_of(options, setting.model.max_position))
            points.append(
                sized.simulate(
                    candidate,
                    asked,
                    limits_of(options, setting.model.max_position),
                    exact_tokens=options["exact_tokens"],
                    measured_gpus=options["measured_gpus"] if options["measured"] else 0,
                )
            )
    return points


def _measured(options: dict[str, Any]) -> list[Point]:
    if options["measured"] is None:
        return []
    from flexmoe.planner.figures import measured_points

    lines = text_of(options["measured"]).splitlines()
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ConfigError(f"the rows {options['measured']} are not JSON lines: {error}.") from error
    return measured_points(rows, options["measured_gpus"])


def _append(path: Path, points: Sequence[Point]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(point)) + "\n" for point in points)
    except OSError as error:
        raise ConfigError(f"the rows {path} cannot be written: {error.strerror}.") from error


def _print(points: Sequence[Point], setting: Setting, seconds: float) -> None:
    console = wide_console()
    console.print(f"{setting.name} on {setting.machine.device.name} ({setting.machine.name})", markup=False)
    console.print(_table(points))
    console.print(
        "req/s: as they came. TTFT, TPOT: ms that half of all requests (p50), or 99 of 100 (p99), do not exceed. KV %: "
        "of the cache in use, at most. imb.: load of the busiest rank's experts over the mean. busy %: of the time.",
        style="dim",
        markup=False,
    )
    note(times_of(setting.machine))
    for gpus, plan in dict.fromkeys((point.gpus, point.plan) for point in points if point.plan):
        note(f"{several(gpus, 'GPU')}: {plan}")
    for point in points:
        on = several(point.gpus, "GPU")
        if point.simulated < point.replicas:
            note(f"{on}: {point.simulated} of {point.replicas} replicas simulated, with their share.")
        if point.cut_tokens:
            note(f"{on}: {point.cut_tokens} tokens were left out, for requests longer than fit.")
    note(f"{sum(point.requests for point in points)} requests simulated in {seconds:.1f} s.")


def _table(points: Sequence[Point]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    heads = ("GPUs", "req/s", "TTFT p50", "p99", "TPOT p50", "p99", "tok/s", "KV %", "imb.", "busy %", "")
    for name in heads:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for point in points:
        times = [
            "-" if name not in spread else f"{spread[name]:.3g}"
            for spread in (point.ttft_ms, point.tpot_ms)
            for name in ("p50", "p99")
        ]
        shares = ["-" if share is None else f"{100 * share:.0f}" for share in (point.kv_used, point.busy)]
        imbalance = "-" if point.imbalance is None else f"{point.imbalance:.2f}"
        speed = f"{point.output_tokens_per_s:,.0f}"
        cells = (str(point.gpus), f"{point.rate:.3g}", *times, speed, shares[0], imbalance, shares[1])
        table.add_row(*cells, point.kind)
    return table
