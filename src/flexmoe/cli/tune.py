"""`flexmoe tune`: fit the GPU kernels to a model. Leaves: a table on stdout, and a file that engines read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexmoe.cli.bench_options import some_of
from flexmoe.cli.files import OUTPUT
from flexmoe.cli.options import debug_option, numbers
from flexmoe.cli.terminal import note
from flexmoe.config.engine import DTYPES, LoadConfig
from flexmoe.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from flexmoe.bench.tune import Tuned
    from flexmoe.config.model import ModelConfig

OPS = (
    "norm_linear",
    "decode_attention",
    "route",
    "expert_gate_up_gemv",
    "expert_down_gemv",
    "expert_gate_up_grouped",
    "expert_down_grouped",
    "limits",
)


@click.command()
@click.argument("model", required=False)
@click.option(
    "--batch",
    "batches",
    default="1,2,4,8,16,32,64,128",
    show_default=True,
    callback=numbers,
    help="Rows of the decode steps to tune for.",
)
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=60, show_default=True, help="Try no other tile after so long."
)
@click.option("--ops", callback=some_of(OPS), help=f"Some of {', '.join(OPS)}, with commas between.  [default: all]")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Number format.")
@click.option("--device", default="auto", show_default=True, help="cuda or cuda:N.")
@click.option(
    "--out",
    type=OUTPUT,
    help="File to write, or to add to.  [default: the table in your cache folder, which engines read]",
)
@debug_option
def tune(
    model: str | None,
    batches: tuple[int, ...],
    seconds: float,
    ops: tuple[str, ...],
    dtype: str,
    device: str,
    out: Path | None,
) -> None:
    """Fit the GPU kernels to MODEL.

    MODEL is a folder, a name on the Hub, a preset (`flexmoe models` lists them) or nothing for the built-in model; its
    weights are not needed. Times decode steps of a few layers of its shape, with one way after the other to cut their
    work; keeps what saves time and gives the same result, and writes it where every engine on this machine finds it.

    \b
    Examples:
      flexmoe tune mixtral-8x7b
      flexmoe tune olmoe-1b-7b --batch 1,8 --ops norm_linear,route --seconds 20
    """
    gpu, config = _gpu(device), _config(model)
    # Imported here: triton.
    import torch

    from flexmoe.bench.bandwidth import read_bandwidth
    from flexmoe.bench.tune import tune_model
    from flexmoe.kernels.triton.tiles import read, user_file, write

    name = torch.cuda.get_device_name(gpu)
    out = out or user_file(name)
    if out is None:
        raise ConfigError("this user has no home for a cache folder; say where to write with --out FILE.")
    ceiling = read_bandwidth(gpu)
    tuned = tune_model(config, gpu, dtype, batches, ops, seconds, notify=note)
    _print(tuned, ceiling, f"{model or 'the built-in model'} on {name}")
    try:
        write(out, read(out).with_(tuned.table), name)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; give another --out FILE.") from error
    note(f"written to {out}")


def _changes(default: Any, tile: Any) -> str:
    """What sets a tile apart from the operation's own choice."""
    own = asdict(default) if type(default) is type(tile) else {}
    words = [f"{name}={value}" for name, value in asdict(tile).items() if name not in own or own[name] != value]
    return " ".join(words if own else [type(tile).__name__, *words])


def _gpu(name: str) -> torch.device:
    """The device. Raises ConfigError if no Triton kernel runs on it."""
    from flexmoe.engine.device import choose_device
    from flexmoe.kernels.gpu import why_no_triton

    device = choose_device(name)
    if device.type != "cuda":
        raise ConfigError("flexmoe tune times kernels on a CUDA GPU, and there is none here.")
    reason = why_no_triton(device)
    if reason:
        raise ConfigError(f"no kernel to tune runs on device={str(device)!r}: {reason}.")
    return device


def _config(model: str | None) -> ModelConfig:
    from flexmoe.models.hub import open_model

    return open_model(LoadConfig(model=model, load_format="dummy")).config


def _print(tuned: Tuned, ceiling: float, title: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(title, style="bold", markup=False)
    console.print(_table(tuned))
    for limit in tuned.limits:
        console.print(f"{limit.work.op}: up to {limit.rows} rows", markup=False)
    for effect in tuned.effects:
        percent = 100 * effect.moved / (effect.after * 1e-6 * ceiling)
        console.print(
            f"{effect.rows} rows: {effect.before:.2f} us a layer before, {effect.after:.2f} after, "
            f"{percent:.0f}% of bandwidth"
        )
    unfinished = tuned.unfinished()
    if unfinished:
        names = ", ".join(f"{c.job.name} {c.job.rows} ({len(c.waiting)} tiles)" for c in unfinished)
        console.print(f"Not tried for lack of time: {names}. More --seconds reach them.", style="dim", markup=False)
    if tuned.lost:
        console.print(f"Stopped before its time: {tuned.lost}", style="red", markup=False)


def _table(tuned: Tuned) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name in ("what", "rows", "built-in us", "tuned us", "failed", "changed"):
        table.add_column(name, justify="left" if name in ("what", "changed") else "right", no_wrap=name != "changed")
    for contest in tuned.contests:
        if not contest.us:
            continue
        tile = "" if contest.tile is None else _changes(contest.job.default, contest.tile)
        us = f"{contest.us:.2f}" if tile else "-"
        figures = (str(contest.job.rows), f"{contest.default_us:.2f}", us, str(len(contest.failures)))
        table.add_row(contest.job.name, *figures, tile)
    return table
