"""`flexmoe report`: poster and report from recorded rows. Leaves: a folder of PDFs, figures and sources."""

from __future__ import annotations

from pathlib import Path

import click

from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import note


@click.command()
@click.option(
    "--rows",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="File of rows, as `flexmoe bench ... --out` writes them; may be given again.  "
    "[default: benchmarks/results/*.jsonl]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("flexmoe-report"),
    show_default=True,
    help="Folder to write into.",
)
@debug_option
def report(files: tuple[Path, ...], out: Path) -> None:
    """Make a poster and a report from recorded measurements.

    Leaves poster.pdf (A0), report.pdf (A4), every figure as SVG and PNG, and sources.json, which tells of each number
    the file and line that it comes from. Nothing is measured, and no GPU is needed. What rows do not hold is left out.

    \b
    Examples:
      flexmoe report
      flexmoe report --rows rows.jsonl --out my-report
    """
    from flexmoe.report.build import build
    from flexmoe.report.rows import default_files

    for path in build(files or default_files(), out, notify=note):
        click.echo(path)
