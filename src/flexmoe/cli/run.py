"""`flexmoe run`: a FlexFlow script as it is. The script's output and exit status are the command's."""

from __future__ import annotations

import contextlib
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import click

from flexmoe.cli.options import DEBUG, debug_option
from flexmoe.cli.terminal import note
from flexmoe.errors import FlexMoEError


@click.command(
    short_help="Run a FlexFlow Serve SCRIPT as it is.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-m", "as_module", is_flag=True, help="SCRIPT is a module to run, as in `python -m` (uvicorn, say).")
@click.option("-q", "--quiet", is_flag=True, help="Do not say which FlexFlow is used if a real one is installed.")
@debug_option
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(ctx: click.Context, as_module: bool, quiet: bool, script: str, arguments: tuple[str, ...]) -> None:
    """Run a FlexFlow Serve SCRIPT with FlexMoE in FlexFlow's place.

    `import flexflow.serve as ff` and `from flexflow.core import *` give FlexMoE in this process; nothing is installed
    and the script is not changed. What follows SCRIPT is the script's own.

    \b
    Examples:
      flexmoe run incr_decoding.py -config-file llama.json
      flexmoe run -m uvicorn fastapi_incr:app --port 3000
    """
    from flexmoe.serve import modules

    real = modules.installed_flexflow()
    if real is not None and not quiet:
        note(f"A FlexFlow is installed in {real}; this run uses FlexMoE instead. For the other: python {script}")
    modules.provide()
    if not as_module and not Path(script).is_file():
        raise click.UsageError(f"There is no script {script!r}; give the path of a Python file, or -m and a module.")
    with _as_main(script, arguments, as_module):
        try:
            if as_module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
        except Exception as error:  # noqa: BLE001  (the script's own: told as Python would)
            _tell(error, script, debug=bool(ctx.meta.get(DEBUG)))
            ctx.exit(1)


@contextlib.contextmanager
def _as_main(script: str, arguments: tuple[str, ...], as_module: bool) -> Iterator[None]:
    """sys.argv, sys.path and Ctrl-C as a script finds them under `python`."""
    argv, path, first = sys.argv, sys.path, str(Path.cwd() if as_module else Path(script).resolve().parent)
    sys.argv = [script, *arguments]
    sys.path = [first, *path]
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if main_thread else None
    try:
        yield
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
        sys.argv, sys.path = argv, path


def _tell(error: Exception, script: str, *, debug: bool) -> None:
    """An error of ours in one line with its place in the script; others as a traceback that starts in the script."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [index for index, frame in enumerate(frames) if frame.filename in (script, str(Path(script).resolve()))]
    if isinstance(error, FlexMoEError) and not debug:
        place = f"{script}:{frames[own[-1]].lineno}: " if own else ""
        click.echo(f"Error: {place}{error}", err=True)
        return
    trace = error.__traceback__
    for _ in range(own[0] if own and not debug else 0):
        trace = trace.tb_next if trace is not None else None
    traceback.print_exception(type(error), error, trace)
