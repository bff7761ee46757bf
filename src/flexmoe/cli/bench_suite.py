"""`flexmoe bench suite`: all that can be measured of a model on this machine. Leaves: a file of rows, and a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexmoe.cli.bench_options import positive, subject_options
from flexmoe.cli.files import OUTPUT
from flexmoe.cli.options import debug_option, numbers
from flexmoe.cli.terminal import note

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexmoe.bench.suite import Progress


def _words(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in value.split(",")))


@click.command(short_help="Measure all that a poster needs.")
@click.argument("model", required=False)
@click.option(
    "--engine",
    "engines",
    default="flexmoe,hf-default",
    show_default=True,
    callback=_words,
    help="Several with commas between: flexmoe, hf-best, hf-default.",
)
@click.option("--url", "urls", multiple=True, help="An OpenAI server that runs already, of any kind; repeatable.")
@click.option("--batch", "batches", default="1,8,32", show_default=True, callback=numbers, help="Sizes for latency.")
@click.option(
    "--streams", "concurrencies", default="1,16", show_default=True, callback=numbers, help="At once, for serving."
)
@click.option("--requests", type=positive, default=64, show_default=True, help="For throughput.")
@click.option("--prompt-len", type=positive, default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens of each answer.")
@subject_options
@click.option(
    "--out",
    type=OUTPUT,
    default=Path("suite.jsonl"),
    show_default=True,
    help="File to append rows to. What is in it already is not measured again.",
)
@debug_option
def suite(out: Path, **options: Any) -> None:
    """Measure latency, throughput, serving and the operations of a step of MODEL on this machine.

    MODEL is a folder, a name on the Hub, a preset or nothing for the built-in model, which takes some minutes on a
    CPU. Interrupt it when you like: run again, it goes on where it was. Leave the machine alone meanwhile. Then
    `flexmoe report --rows suite.jsonl` makes your poster.

    \b
    Examples:
      flexmoe bench suite
      flexmoe bench suite olmoe-1b-7b --engine flexmoe,hf-best,hf-default --out olmoe.jsonl
      flexmoe bench suite --engine flexmoe --url http://127.0.0.1:8080
    """
    from flexmoe.bench.record import append
    from flexmoe.bench.suite import SuiteOptions, read, run

    there = read(out)
    with _bar() as tell:
        for row in run(SuiteOptions(**options), there, tell, note):
            append(out, row)
    _print(read(out))
    note(f"flexmoe report --rows {out} makes a poster of these.")


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, lines elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield lambda at: note(f"{at.done + 1} of {at.total}, {_left(at.left)}: {at.now}") if at.now else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, left="")
        yield lambda at: bar.update(
            task, completed=at.done, total=at.total, description=at.now or "", left=_left(at.left)
        )


def _left(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "suite" in row:
            groups.setdefault(", ".join(row["suite"].split(", ")[3:]), []).append(row)
    console = Console(highlight=False)
    for title, of_group in groups.items():
        table = Table(box=SIMPLE_HEAD)
        for name in ("", "engine", "", "result", "% floor"):
            table.add_column(name, justify="right" if name in ("result", "% floor") else "left")
        for row in of_group:
            table.add_row(*row["suite"].split(", ")[:3], *_figures(row["benchmark"], row["result"]))
        console.print(title, style="bold", markup=False)
        console.print(table)


def _figures(benchmark: str, result: dict[str, Any]) -> tuple[str, str]:
    if "error" in result:
        return f"failed: {result['error']}", "-"
    floor = f"{result['percent_of_floor']:.0f}" if "percent_of_floor" in result else "not known"
    if benchmark == "latency":
        return f"{result['ms']:.3f} ms a step", floor
    if benchmark == "profile":
        longest = result["operations"][0]
        return f"{longest['operation']} {longest['share_percent']:.0f}% of {result['step_ms']:.3f} ms", "by operation"
    if benchmark == "throughput":
        return f"{result['output_tokens_per_s']:,.0f} tokens/s", floor
    words = f"{result['output_tokens_per_s'] or 0:,.0f} tokens/s"
    if result["ttft_ms"]:
        words += f", first after {result['ttft_ms']['p50']:.1f} ms"
    return words, floor
