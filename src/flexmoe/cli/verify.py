"""`flexmoe verify`: compare a model with transformers. Leaves: a table or JSON, and a status: 1 if it differs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import note
from flexmoe.config.engine import EXPERT_BACKENDS

if TYPE_CHECKING:
    from flexmoe.verify.report import Report

_COLOURS = {"pass": "green", "tie": "yellow", "fail": "bold red", "info": "dim", "skipped": "dim"}
_positive = click.IntRange(min=1)


@click.command(short_help="Compare MODEL with Hugging Face transformers.")
@click.argument("model", required=False)
@click.option("-p", "--prompt", "prompts", multiple=True, help="Compare on this text; may be given several times.")
@click.option("--max-tokens", type=_positive, default=64, show_default=True, help="New tokens for each prompt.")
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16")),
    default="float32",
    show_default=True,
    help="Number format of both. In bfloat16 limits are wider, and freely chosen tokens are not judged.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N, for both.")
@click.option("--threads", type=_positive, help="Threads on a CPU.  [default: one a physical core]")
@click.option(
    "--expert-backend",
    type=click.Choice(EXPERT_BACKENDS),
    default="auto",
    show_default=True,
    help="How experts are computed.",
)
@click.option(
    "--quantization",
    metavar="int8|int4|FOLDER",
    help="Compare weights of so few bits, or those in a folder of `flexmoe quantize`, with full ones, on a CPU; "
    "without transformers.",
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def verify(
    model: str | None,
    prompts: tuple[str, ...],
    max_tokens: int,
    dtype: str,
    device: str,
    threads: int | None,
    expert_backend: str,
    quantization: str | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Compare MODEL, a folder or a name on the Hub, with Hugging Face transformers.

    Without MODEL the built-in one is compared. Hidden states, router choices and logits are compared layer by layer,
    then greedy tokens: alone, batched, with chunked prefill, after a prefix hit and after preemption.
    The exit status is 0 if all agree, and 1 if anything differs.

    With --quantization nothing is judged: it prints the perplexity of both and how often they agree on the next token,
    on a text that no model has learnt, or on that of --prompt.

    \b
    Needs transformers: pip install 'flexmoe[hf]'
    """
    from flexmoe.verify.quality import TEXTS, measure

    if quantization is not None:
        found = measure(model, quantization, prompts or TEXTS, dtype=dtype, threads=threads, revision=revision)
        click.echo(json.dumps(asdict(found), indent=2) if as_json else found.line(dtype))
        return
    from flexmoe.verify.run import VerifyOptions
    from flexmoe.verify.run import verify as run

    options = VerifyOptions(
        model=model,
        prompts=prompts,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        threads=threads,
        expert_backend=expert_backend,
        revision=revision,
    )
    report = run(options, notify=note)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print(report)
    sys.exit(0 if report.passed else 1)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    facts = report.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    title = f"{facts['model']}: {facts['architecture']}, {facts['dtype']} on {facts['device']}\n{versions}"
    table = Table("check", "result", "figure", "limit", title=title, title_justify="left")
    for check in report.checks:
        colour = _COLOURS[check.outcome]
        figure = "\n".join(filter(None, (check.figure, check.detail)))
        table.add_row(Text(check.name), Text(check.outcome, colour), Text(figure), Text(check.limit))
    console = Console()
    console.print(table)
    console.print(Text(report.verdict, "bold green" if report.passed else "bold red"))
