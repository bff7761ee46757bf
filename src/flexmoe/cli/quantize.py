"""`flexmoe quantize`: a checkpoint in few bits. Enters: a model and a folder to make. Leaves: it, and a line."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import size
from flexmoe.config.engine import QUANTIZATIONS
from flexmoe.config.packing import GROUP


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(QUANTIZATIONS), default="int8", show_default=True, help="Bits of a weight.")
@click.option(
    "--group",
    type=click.IntRange(min=1),
    default=GROUP,
    show_default=True,
    metavar="N",
    help=f"Weights of a row that share a scale, a multiple of {GROUP}.",
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@debug_option
def quantize(model: str, out: Path, to: str, group: int, revision: str | None) -> None:
    """Write MODEL with rounded weights into the new folder OUT.

    MODEL is a folder, a name on the Hub, or `builtin`. OUT is loaded like any model, without --quantization, and
    equals what that option makes of MODEL bit for bit if --group is left alone. Of MODEL a few rows are in memory at a
    time. What the rounding costs: flexmoe verify MODEL --quantization OUT.
    """
    from flexmoe.config.engine import LoadConfig
    from flexmoe.config.packing import Packing
    from flexmoe.models.hub import open_model
    from flexmoe.models.quantized import BITS
    from flexmoe.models.save_quantized import save_quantized

    packing, show = Packing(BITS[to], group), sys.stderr.isatty()
    source = open_model(LoadConfig(model=model, revision=revision, progress=show))
    report = save_quantized(source, packing, out, show)
    files = "1 file" if report.num_files == 1 else f"{report.num_files} files"
    click.echo(
        f"{out}: {to} in groups of {group}, {size(report.bytes_read)} of weights in {size(report.bytes_written)}, "
        f"{files}"
    )
