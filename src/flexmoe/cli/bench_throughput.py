"""`flexmoe bench throughput`: many requests together, without a server. Leaves: a table and a row an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flexmoe.cli.bench_options import layers_option, positive, some_of, subject_options
from flexmoe.cli.files import OUTPUT
from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import note

_ENGINES = ("flexmoe", "hf-default")


@click.command(short_help="Serve many requests together, and count tokens a second.")
@click.argument("model", required=False)
@click.option("--requests", type=positive, default=512, show_default=True, help="How many.")
@click.option("--prompt-len", type=positive, default=512, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens of each answer.")
@click.option(
    "--engine",
    "engines",
    default="flexmoe",
    show_default=True,
    callback=some_of(_ENGINES),
    help="flexmoe, hf-default, or both with a comma between. The latter is Hugging Face transformers as it comes, on "
    "the same weights, in batches of 16.",
)
@click.option("--max-num-seqs", type=positive, help="Requests that run together.  [default: all, up to 512]")
@click.option(
    "--max-num-batched-tokens", type=positive, help="Tokens computed together.  [default: the engine's choice]"
)
@click.option("--one-pass", is_flag=True, help="Compute decodes beside prompts in one pass over the weights.")
@click.option(
    "--prompts-ahead/--no-prompts-ahead", default=True, show_default=True, help="Launch steps with prompts ahead, too."
)
@layers_option
@subject_options
@click.option("--out", type=OUTPUT, help="File to append a JSON row an engine to.")
@debug_option
def throughput(
    model: str | None, out: Path | None, engines: tuple[str, ...], load_format: str, layers: int | None, **options: Any
) -> None:
    """Serve many requests of MODEL together, and count tokens a second.

    MODEL is a folder, a name on the Hub, a preset (`flexmoe models` lists them) or nothing for the built-in model. All
    requests are there from the start: random prompts of one length, greedy answers of one length. The table also says
    how busy the device was once all was in full swing, and what part of the time reading memory for the decode steps
    must take.

    \b
    Examples:
      flexmoe bench throughput --requests 64 --prompt-len 64 --output-len 64
      flexmoe bench throughput olmoe-1b-7b --engine flexmoe,hf-default --out rows.jsonl
      flexmoe bench throughput mixtral-8x7b --layers 16
    """
    from flexmoe.bench.record import append
    from flexmoe.bench.subject import Changes, open_subject
    from flexmoe.bench.throughput import ThroughputOptions, measure

    rows = []
    with open_subject(model, load_format, Changes(layers=layers)) as subject:
        for engine in engines:
            asked = ThroughputOptions(engine=engine, **options)
            lengths = f"{asked.prompt_len} + {asked.output_len} tokens"
            note(f"{subject.label}: {engine}, {asked.requests} requests of {lengths}")
            rows.append(measure(subject, asked))
            if out is not None:
                append(out, rows[-1])
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    params = first["params"]
    console = Console(highlight=False)
    console.print(
        f"{first['model']['label']}, {params['dtype']} on {first['device']['name']}: {params['requests']} requests, "
        f"{params['prompt_len']} tokens in, {params['output_len']} out",
        style="bold",
        markup=False,
    )
    table = Table(box=SIMPLE_HEAD)
    for name in ("engine", "seconds", "output tokens/s", "all tokens/s", "steps", "% busy", "% floor"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in rows:
        result = row["result"]
        rates = [f"{result[name]:,.0f}" for name in ("output_tokens_per_s", "total_tokens_per_s")]
        known = [str(result[name]) if name in result else "-" for name in ("steps", "device_busy_percent")]
        table.add_row(row["engine"], f"{result['seconds']:.2f}", *rates, *known, f"{result['percent_of_floor']:.0f}")
    console.print(table)
    console.print(
        "seconds: until the last answer was complete. % busy: of the time that the device worked, once all was in full "
        "swing. % floor: of the time that reading memory for the decode steps takes at least.",
        style="dim",
    )
