"""`flexmoe bench`: measure speed. Leaves: a table on stdout and, with --out, a JSON row for each figure's line.

`latency` is here; `machine`, `serve`, `suite` and `throughput` are in files of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexmoe.cli.bench_machine import machine
from flexmoe.cli.bench_options import layers_option, positive, some_of, subject_options
from flexmoe.cli.bench_serve import serve
from flexmoe.cli.bench_suite import suite
from flexmoe.cli.bench_throughput import throughput
from flexmoe.cli.files import OUTPUT
from flexmoe.cli.options import debug_option, numbers
from flexmoe.cli.terminal import count, note

if TYPE_CHECKING:
    from rich.table import Table

_ENGINES = ("flexmoe", "hf-best", "hf-default")


@click.group(short_help="Measure speed, beside memory's limit and other engines.")
def bench() -> None:
    """Measure speed, beside what memory allows and beside other engines."""


bench.add_command(machine)
bench.add_command(serve)
bench.add_command(suite)
bench.add_command(throughput)


@bench.command()
@click.argument("model", required=False)
@click.option("--batch", "batches", default="1,8,32,128", show_default=True, callback=numbers, help="Batch sizes.")
@click.option("--prompt-len", type=positive, default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=positive, default=64, show_default=True, help="Steps that are timed.")
@click.option(
    "--engine",
    "engines",
    default="flexmoe",
    show_default=True,
    callback=some_of(_ENGINES),
    help="Several with commas between: flexmoe, hf-best, hf-default. The latter two are Hugging Face transformers, on "
    "the same weights: in the fastest configuration that is found, and as it comes.",
)
@layers_option
@click.option("--experts", type=positive, help="Change a preset: how many experts in a layer.")
@click.option("--top-k", type=positive, help="Change a preset: how many experts a token.")
@click.option("--expert-width", type=positive, help="Change a preset: how wide an expert's hidden layer is.")
@subject_options
@click.option("--max-num-batched-tokens", type=positive, help="Tokens computed together.  [default: all prompts]")
@click.option(
    "--hf-seconds",
    type=click.FloatRange(min=0),
    default=240,
    show_default=True,
    help="hf-best: start no other configuration after so long, for each batch size. One is always tried.",
)
@click.option("--out", type=OUTPUT, help="File to append a JSON row a measurement to.")
@debug_option
def latency(model: str | None, out: Path | None, **options: Any) -> None:
    """Time the decode steps of MODEL.

    MODEL is a folder, a name on the Hub, a preset (`flexmoe models` lists them) or nothing for the built-in model. Each
    batch of random prompts gets the same number of greedy tokens from every engine. The table shows milliseconds a step
    beside the floor: the bytes that a step must read, with the experts that were really chosen, at the speed at which
    this device was measured to read.

    \b
    Examples:
      flexmoe bench latency
      flexmoe bench latency mixtral-8x7b --layers 8 --engine flexmoe,hf-best,hf-default --out rows.jsonl
      flexmoe bench latency olmoe-1b-7b --experts 128 --batch 1
    """
    from flexmoe.bench.latency import LatencyOptions, measure
    from flexmoe.bench.record import append
    from flexmoe.bench.subject import Changes

    changes = Changes(**{name: options.pop(name) for name in ("layers", "experts", "top_k", "expert_width")})
    tokens = options.pop("max_num_batched_tokens")
    llm = {} if tokens is None else {"max_num_batched_tokens": tokens}
    rows = []
    for row in measure(LatencyOptions(model=model, changes=changes, llm=llm, **options), notify=note):
        rows.append(row)
        if out is not None:
            append(out, row)
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_title(rows), style="bold", markup=False)
    console.print(_table(rows))
    for row in rows:
        if row["engine"] == "hf-best" and "description" in row["config"]:
            console.print(f"hf-best at batch {row['params']['batch']}: {row['config']['description']}")
    steps = rows[0]["params"]["output_len"]
    console.print(
        f"ms: of a step, flexmoe's the mean of {steps} timed one by one, others' (time for {steps + 1} tokens - time "
        f"for 1) / {steps}, best of two. floor: the bytes a step must read, D distinct experts a layer among them, "
        "at the speed at which this device reads. first: ms until all prompts have a token. equal: answers that are "
        "flexmoe's token for token, and where one leaves them.",
        style="dim",
    )
    if any(row["result"].get("percent_of_floor", 0) > 100 for row in rows):
        console.print(
            "Faster than the floor: the device was busy while its speed of reading was measured.", style="red"
        )


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for name in ("engine", "batch", "ms", "floor", "% floor", "D", "first", "equal"):
        table.add_column(name, justify="left" if name in ("engine", "equal") else "right", no_wrap=name == "engine")
    for row in sorted(rows, key=lambda row: int(row["params"]["batch"])):
        result, batch = row["result"], str(row["params"]["batch"])
        if "error" in result:
            table.add_row(row["engine"], batch, *["-"] * 5, Text(f"failed: {result['error']}", "red"))
            continue
        figures = [f"{result[name]:.3f}" for name in ("ms", "floor_ms")] + [f"{result['percent_of_floor']:.0f}"]
        figures += [f"{result['distinct_experts']:.1f}", f"{result['first_token_ms']:.1f}"]
        table.add_row(row["engine"], batch, *figures, _equal(row))
    return table


def _equal(row: dict[str, Any]) -> str:
    result = row["result"]
    if "equal_answers" not in result:
        return ""
    words = f"{result['equal_answers']} of {row['params']['batch']}"
    return words if result["first_difference"] is None else f"{words}, from {result['first_difference']}"


def _title(rows: list[dict[str, Any]]) -> str:
    model, params, device = (rows[0][name] for name in ("model", "params", "device"))
    speeds = [row["result"]["read_gb_s"] for row in rows if "read_gb_s" in row["result"]]
    reads = f", which reads {speeds[0]:,.0f} GB/s" if speeds else ""
    weights = "random weights" if model["load_format"] == "dummy" else "its weights"
    return (
        f"{model['label']}: {model['architecture']}, {count(model['parameters'])} parameters "
        f"({count(model['active_parameters'])} active), {weights}\n"
        f"{params['dtype']} on {device['name']}{reads}; prompts of {params['prompt_len']} tokens"
    )
