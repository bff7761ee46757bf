"""Options that `flexmoe plan` and `flexmoe simulate` share. Enters: words. Leaves: a setting, a workload, limits."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexmoe.config.engine import DTYPES, QUANTIZATIONS, SchedulerConfig
from flexmoe.config.machine import shipped_machines

if TYPE_CHECKING:
    from rich.console import Console

    from flexmoe.config.machine import Machine
    from flexmoe.planner.planning import Setting
    from flexmoe.planner.workload import Workload

_WIDTH = 120
_positive, _above_zero = click.IntRange(min=1), click.FloatRange(min=0, min_open=True)
_input = click.Path(exists=True, dir_okay=False)
_default = SchedulerConfig(max_num_seqs=256)  # seats enough that another plan does not win by having more


def _length(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """128 as (128, 128), 64:256 as (64, 256)."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+))?", value.strip(), re.ASCII)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise click.BadParameter(f"{value!r} is neither a positive integer nor a range of them; use 128 or 64:256.")
    return low, high


def _machine(_: click.Context, __: click.Parameter, value: str | None) -> str:
    """Required, and told what there is if it is left out."""
    if value is None:
        known = ", ".join(shipped_machines())
        raise click.UsageError(f"Missing option '--machine'; use one of {known}, or a file of `flexmoe bench machine`.")
    return value


_WORKLOAD = (
    click.option(
        "--workload",
        type=_input,
        help="File of the workload: JSON as in docs/planner.md, or a recorded trace.  [default: the options below]",
    ),
    click.option("--trace", type=_input, help="File that says when requests come and how long they are."),
    click.option("--rate", type=_above_zero, help="Requests a second.  [default: 1; of a trace its own]"),
    click.option("--input-len", metavar="N[:M]", callback=_length, help="Tokens of a prompt.  [default: 512]"),
    click.option("--output-len", metavar="N[:M]", callback=_length, help="Tokens of an answer.  [default: 128]"),
    click.option("--length-scale", type=_above_zero, help="Factor for the lengths of a trace.  [default: 1]"),
    click.option(
        "--duration",
        type=_above_zero,
        help="Seconds of requests.  [default: all; to simulate without a trace or --num-requests 600]",
    ),
    click.option("--num-requests", type=_positive, help="Requests at most.  [default: 1000; of a trace all]"),
    click.option("--slo-ttft-ms", type=_above_zero, help="A first token should come within so many milliseconds."),
    click.option("--slo-tpot-ms", type=_above_zero, help="The others should take so many each, or less."),
)
_WORKLOAD_NAMES = (
    "trace", "rate", "input_len", "output_len", "length_scale", "duration", "num_requests", "slo_ttft_ms",
    "slo_tpot_ms",
)  # fmt: skip

_SETTING = (
    click.option(
        "--machine",
        metavar="NAME|FILE",
        callback=_machine,
        help=f"What it runs on: {', '.join(shipped_machines())}, or a file of `flexmoe bench machine`.  [required]",
    ),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Number format."),
    click.option("--quantization", type=click.Choice(QUANTIZATIONS), help="Weights in few bits.  [default: none]"),
    click.option("--routing", type=_input, help="Recording of how often experts are chosen.  [default: all alike]"),
    click.option("--max-num-seqs", type=_positive, default=_default.max_num_seqs, show_default=True,
                 help="Requests that run together, on each data rank."),
    click.option("--max-num-batched-tokens", type=_positive, default=_default.max_num_batched_tokens,
                 show_default=True, help="Tokens computed together."),
    click.option("--max-model-len", type=_positive, help="Prompt and answer together.  [default: the model's]"),
)  # fmt: skip


def workload_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a workload; `workload_of` reads them."""
    return _decorated(function, _WORKLOAD)


def setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a machine and an engine; `setting_of` and `limits_of` read them."""
    return _decorated(function, _SETTING)


def _decorated(function: Callable[..., Any], options: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


def workload_of(options: Mapping[str, Any]) -> Workload:
    """The workload's file, and over it what is given beside it."""
    from flexmoe.planner.workload import Workload

    given = {name: options[name] for name in _WORKLOAD_NAMES if options.get(name) is not None}
    file = options.get("workload")
    return replace(Workload.read(Path(file)), **given) if file else Workload(**given)


def limits_of(options: Mapping[str, Any], max_position: int) -> SchedulerConfig:
    """Limits of a step and of a request."""
    length = min(options["max_model_len"] or max_position, max_position)
    return SchedulerConfig(
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        max_model_len=length,
    )


def setting_of(model: str | None, options: Mapping[str, Any]) -> Setting:
    """Model and machine. Raises ConfigError or CheckpointError where there is no such one."""
    from flexmoe.planner.planning import Setting

    return Setting.open(
        model,
        options["machine"],
        dtype=options["dtype"],
        quantization=options["quantization"],
        routing=options["routing"],
    )


def times_of(machine: Machine) -> str:
    """What times of a served workload hold, for the reader."""
    if machine.serving is not None:
        return "TTFT and TPOT hold what an HTTP server adds."
    return (
        f"TTFT and TPOT are of the engine alone: what an HTTP server adds was not measured for {machine.name}; "
        "`flexmoe bench machine` does."
    )


def wide_console() -> Console:
    """A terminal as it is; a file gets lines as long as the tables are wide."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
