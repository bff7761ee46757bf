"""`flexmoe bench serve`: load on an OpenAI server. Leaves: a table on stdout and, with --out, a row of JSON.

Nothing here imports torch: the client starts at once, also on a machine without a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexmoe.cli.files import OUTPUT
from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import note

if TYPE_CHECKING:
    from rich.table import Table

    from flexmoe.bench.serving import ServeOptions

_positive, _above_zero = click.IntRange(min=1), click.FloatRange(min=0, min_open=True)
_input = click.Path(exists=True, dir_okay=False, path_type=Path)
_TIMES = {"ttft_ms": "TTFT", "itl_ms": "ITL", "tpot_ms": "TPOT", "e2e_ms": "end to end", "queued_ms": "queued"}
_CACHED = 0.05  # part of random prompts that a server may know by chance
_LATE_MS = 10  # p99 of this program's own delays above which its figures are doubtful


def _range(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    """128 as (128, 128), 64:256 as (64, 256)."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", value.strip(), re.ASCII)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise click.BadParameter(f"{value!r} is neither a positive integer nor a range of them; use 128 or 64:256.")
    return low, high


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server is.")
@click.option("-m", "--model", help="The name under which it is served.  [default: the first that the server lists]")
@click.option("--api-key", help="Key that the server asks for.")
@click.option(
    "--endpoint",
    type=click.Choice(("completions", "chat")),
    default="completions",
    show_default=True,
    help="/v1/completions, or /v1/chat/completions.",
)
@click.option("--rate", type=_above_zero, help="Requests a second, at random times (Poisson).")
@click.option(
    "--trace",
    type=_input,
    help="File that says when requests come and how long they are: Azure's CSV or "
    "Mooncake's JSON lines, also as .xz or .gz.",
)
@click.option(
    "--concurrency", type=_positive, help="Requests under way at most.  [default: 16; with --rate or --trace no limit]"
)
@click.option("--num-requests", type=_positive, help="How many.  [default: 100; with --trace or --duration all]")
@click.option("--duration", type=_above_zero, help="With --rate or --trace: nothing is due after so many seconds.")
@click.option(
    "--warm-up", type=click.IntRange(min=0), default=2, show_default=True, help="Requests before, not counted."
)
@click.option("--time-scale", type=_above_zero, default=1, show_default=True, help="Factor for the gaps of a trace.")
@click.option("--length-scale", type=_above_zero, default=1, show_default=True, help="Factor for its lengths.")
@click.option(
    "--input-len",
    metavar="N[:M]",
    default="128",
    show_default=True,
    callback=_range,
    help="Tokens of a prompt, or a range to draw them from.",
)
@click.option(
    "--output-len", metavar="N[:M]", default="64", show_default=True, callback=_range, help="Tokens of an answer."
)
@click.option("--text", is_flag=True, help="Prompts of words in place of token ids, as a chat has in any case.")
@click.option(
    "--prompts",
    type=_input,
    help="File of prompts: JSON lines, each a text, a list of token ids, or an "
    "object with `prompt` or `messages` and perhaps `max_tokens`.",
)
@click.option("--vocab-size", type=_positive, help="Token ids are below it.  [default: what the server tells, or 1000]")
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=True,
    show_default=True,
    help="Ask for all tokens, as FlexMoE, vLLM and llama.cpp can.",
)
@click.option("-t", "--temperature", type=click.FloatRange(min=0), default=0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of prompts, arrivals and samples.")
@click.option("--timeout", type=_above_zero, default=600, show_default=True, help="Seconds for an answer.")
@click.option("--slo-ttft-ms", type=_above_zero, help="A good answer's first token comes within so many milliseconds.")
@click.option("--slo-tpot-ms", type=_above_zero, help="Its other tokens take so many each on average, or less.")
@click.option(
    "--machine",
    metavar="NAME|FILE",
    help="What FlexMoE's server runs on, for the floor of its times: as `flexmoe plan` takes it.",
)
@click.option("--out", type=OUTPUT, help="File to append a JSON row to.")
@click.option("--requests", "requests_out", type=OUTPUT, help="File to append a JSON line for each request to.")
@debug_option
def serve(out: Path | None, requests_out: Path | None, **options: Any) -> None:
    """Put load on an OpenAI server and measure.

    The server may be FlexMoE's, vLLM's, llama.cpp's or another. Requests come at random times (--rate), as they once
    came (--trace), or, with neither, as soon as one of --concurrency has ended. Every request is accounted for; Ctrl-C
    prints what there is. The exit status is 1 if no request was answered.

    \b
    Examples:
      flexmoe bench serve --concurrency 16 --input-len 512 --output-len 128
      flexmoe bench serve --rate 4 --duration 60 --slo-ttft-ms 500 --slo-tpot-ms 50 --out rows.jsonl
      flexmoe bench serve --trace azure_llm_2023_conv.csv --length-scale 0.1 --num-requests 500
    """
    from flexmoe.bench.record import append
    from flexmoe.bench.serving import measure

    report = measure(_options(options), notify=note)
    if out is not None:
        append(out, report.row)
    if requests_out is not None:
        for outcome in report.outcomes:
            append(requests_out, outcome.line())
    _print(report.row)
    if report.interrupted:
        raise KeyboardInterrupt
    if not report.row["result"]["succeeded"]:
        raise click.exceptions.Exit(1)


def _options(options: dict[str, Any]) -> ServeOptions:
    """The command's options, each where it belongs."""
    from dataclasses import fields

    from flexmoe.bench.endpoint import CHAT, EndpointOptions
    from flexmoe.bench.load import LoadOptions
    from flexmoe.bench.outcomes import Slo
    from flexmoe.bench.serving import ServeOptions
    from flexmoe.config.machine import Machine

    options["text"] |= options["endpoint"] == CHAT
    load, endpoint = (
        {field.name: options[field.name] for field in fields(part)} for part in (LoadOptions, EndpointOptions)
    )
    return ServeOptions(
        endpoint=EndpointOptions(**endpoint),
        load=LoadOptions(**load),
        slo=Slo(ttft_ms=options["slo_ttft_ms"], tpot_ms=options["slo_tpot_ms"]),
        concurrency=options["concurrency"],
        vocab_size=options["vocab_size"],
        machine=None if options["machine"] is None else Machine.load(options["machine"]),
    )


# ------------------------------------------------------------------ what is printed


def _print(row: dict[str, Any]) -> None:
    from rich.console import Console

    console, result = Console(highlight=False), row["result"]
    console.print(_title(row), style="bold", markup=False)
    console.print(_table(row))
    console.print("\n".join(_speeds(result)), markup=False)
    for kind, count in result["errors"].items():
        said = result["error_messages"][kind] or ""
        console.print(f"{count} failed, {kind}" + (f": {said}" if said else ""), style="red", markup=False)
        if "ignore_eos" in said:
            console.print("This server does not know ignore_eos; leave it out with --no-ignore-eos.", style="red")
    for doubt in _doubts(row):
        console.print(doubt, style="red", markup=False)


def _title(row: dict[str, Any]) -> str:
    params, result = row["params"], row["result"]
    if params["trace"]:
        arrivals = f"arrivals of {Path(params['trace']).name}"
    else:
        arrivals = f"{params['rate']:g} requests a second" if params["rate"] else "a closed loop"
    limit = f", at most {params['concurrency']} under way" if params["concurrency"] else ""
    return (
        f"{row['model']['name']} at {row['config']['url']}: {result['succeeded']} of {result['requests']} requests "
        f"answered in {result['seconds']:.1f} s\n{arrivals}{limit}; {result['most_running']} were under way at once"
    )


def _table(row: dict[str, Any]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    table = Table(box=SIMPLE_HEAD)
    for name in ("ms", *columns):
        table.add_column(name, justify="left" if name == "ms" else "right")
    for name, label in _TIMES.items():
        times = row["result"][name]
        if times is not None and not (name == "queued_ms" and row["params"]["concurrency"] is None):
            table.add_row(label, *(f"{times[column]:,.2f}" for column in columns))
    return table


def _speeds(result: dict[str, Any]) -> list[str]:
    total = result["total_tokens_per_s"]
    words = [
        f"{result['requests_per_s'] or 0:.2f} requests/s",
        f"{result['output_tokens_per_s'] or 0:,.1f} output tokens/s",
    ]
    words += [] if total is None else [f"{total:,.1f} tokens/s with prompts"]
    lines = [", ".join(words)]
    if "slo" in result:
        limits = (f"{name[:4].upper()} {limit:g} ms" for name, limit in result["slo"].items() if limit is not None)
        lines.append(
            f"within {' and '.join(limits)}: {result['within_slo']} of {result['requests']} requests, "
            f"{result['goodput_requests_per_s'] or 0:.2f} a second"
        )
    return lines + _floors(result)


def _floors(result: dict[str, Any]) -> list[str]:
    """How near to the machine's own time, if that is known."""
    named = {"first_token_floor": "TTFT", "floor": f"TPOT with {result.get('floor_sequences')} sequences at once"}
    return [
        f"floor of {what}: {result[f'{name}_ms']:,.2f} ms; {result[f'percent_of_{name}']:.0f}% of it was reached"
        for name, what in named.items()
        if f"{name}_ms" in result
    ]


def _doubts(row: dict[str, Any]) -> list[str]:
    """Why figures may be worth less than they look."""
    doubts, result, params = [], row["result"], row["params"]
    client, cached = result["client"], result["cached_tokens"] / (result["prompt_tokens"] or 1)
    if cached > _CACHED and params["trace"] is None and params["prompts"] is None:
        doubts.append(
            f"The server knew {cached:.0%} of the prompts' tokens from before, in its prefix cache: another --seed "
            "makes other prompts."
        )
    if result["tokens_counted_by"] in ("chunks", "both"):
        doubts.append("The server did not count tokens, so pieces of text were counted: a piece may hold several.")
    delays = [client[name]["p99"] for name in ("late_ms", "loop_lag_ms") if client[name] is not None]
    if max(delays, default=0) > _LATE_MS:
        doubts.append(
            f"This client was up to {max(delays):.0f} ms late (p99), with {client['cpu_percent']:.0f}% of a core: it, "
            "or a busy machine, may be what was measured."
        )
    return doubts
