"""`flexmoe profile`: time of each operation of a decode step. Leaves: a table, a trace for Perfetto, a row of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flexmoe.cli.bench_options import layers_option, positive, subject_options
from flexmoe.cli.files import OUTPUT
from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import note


@click.command()
@click.argument("model", required=False)
@click.option("--batch", type=positive, default=1, show_default=True, help="Sequences that decode together.")
@click.option("--prompt-len", type=positive, default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--steps", type=positive, default=16, show_default=True, help="Steps that are watched.")
@layers_option
@subject_options
@click.option(
    "--torch",
    "torch_path",
    is_flag=True,
    help="On a CPU: decode in PyTorch, where router, dispatch, experts and combine are told apart. In C they are one.",
)
@click.option("--trace", type=OUTPUT, help="File for a trace that chrome://tracing and ui.perfetto.dev open.")
@click.option("--out", type=OUTPUT, help="File to append a JSON row to.")
@debug_option
def profile(layers: int | None, trace: Path | None, out: Path | None, **options: Any) -> None:
    """Show where the time of a decode step of MODEL goes.

    MODEL is a folder, a name on the Hub, a preset or nothing for the built-in model. On a GPU kernels are watched
    inside the step's graph; on a CPU stages are, one after the other, and a step is a little slower than alone.

    \b
    Examples:
      flexmoe profile --torch
      flexmoe profile olmoe-1b-7b --batch 8 --trace olmoe.json
      flexmoe profile mixtral-8x7b --layers 8
    """
    from flexmoe.bench.profile import ProfileOptions, measure
    from flexmoe.bench.record import append
    from flexmoe.bench.subject import Changes

    found = measure(ProfileOptions(changes=Changes(layers=layers), **options))
    if out is not None:
        append(out, found.row)
    if trace is not None:
        trace.write_text(json.dumps(found.chrome_trace()), encoding="utf-8")
        note(f"{trace}: open it in ui.perfetto.dev")
    _print(found.row)


def _print(row: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    result, params = row["result"], row["params"]
    console = Console(highlight=False)
    console.print(
        f"{row['model']['label']}, batch {params['batch']}, {params['dtype']} on {row['device']['name']}: "
        f"{result['step_ms']:.3f} ms a step, on average of {params['steps']}",
        style="bold",
        markup=False,
    )
    table = Table(box=SIMPLE_HEAD)
    for name in ("operation", "calls", "µs a step", "share", "MB read", "% of bandwidth"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for one in result["operations"]:
        read = (f"{one['bytes'] / 1e6:,.2f}", f"{one['percent_of_bandwidth']:.0f}") if "bytes" in one else ("", "")
        figures = (f"{one['calls']:g}", f"{one['us']:,.1f}", f"{one['share_percent']:.1f}%")
        table.add_row(one["operation"], *figures, *read)
    console.print(table)
    console.print(
        "MB read: what an operation must read of weights, keys and values; % of bandwidth: beside "
        f"{result['read_gb_s']:g} GB/s, as measured here. host gaps: nothing was at work on the device, or between "
        "two stages.",
        style="dim",
    )
