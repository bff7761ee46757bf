"""The command `flexmoe`. Enters: arguments. Leaves: text and an exit status.

Status: 0; 1 for an error of ours, told in one line; 2 for wrong usage; 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from flexmoe import __version__
from flexmoe.cli.options import DEBUG, debug_option
from flexmoe.errors import FlexMoEError

# In the order of the help. Each is the function of that name in flexmoe/cli/<name>.py.
_COMMANDS = (
    "generate",
    "chat",
    "serve",
    "trace",
    "models",
    "quantize",
    "verify",
    "bench",
    "profile",
    "report",
    "tune",
    "plan",
    "simulate",
    "balance",
    "run",
    "incr_decoding",
)
_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Commands(click.Group):
    """Imports a command's file when it is asked for, and turns our errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _COMMANDS if importlib.util.find_spec(f"flexmoe.cli.{name}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(importlib.import_module(f"flexmoe.cli.{cmd_name}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown command is answered with the nearest known one."""
        known = self.list_commands(ctx)
        near = difflib.get_close_matches(args[0], known, n=1)
        if args[0] not in known and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _quiet_interrupt():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)
        except FlexMoEError as error:
            if ctx.meta.get(DEBUG):
                click.echo(traceback.format_exc(), err=True, nl=False)
            raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _quiet_interrupt() -> Iterator[None]:
    """Within, Ctrl-C ends the process at once.

    Raised as an exception it could be swallowed or garbled: by the imports of torch and numpy, by a step of the
    engine that is half done. Nothing waits to be saved; what was printed is out.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(_: int, __: FrameType | None) -> None:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # a progress bar may have hidden the cursor
    os._exit(_INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="flexmoe %(version)s")
@debug_option
def main() -> None:
    """Run Mixture-of-Experts language models.

    Every command takes a model's folder, its name on the Hugging Face Hub, or nothing for the built-in model.
    """
