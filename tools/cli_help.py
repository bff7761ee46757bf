"""Write docs/cli.md from the command line's own help, so that the page cannot lag behind.

Enters: the click group flexmoe.cli.main:main. Leaves: the page; or, with --check, exit status 1 where it is stale.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 100  # columns; a fixed number, since click would take the terminal's
HEADER = """# The command line

<!-- Written by `make cli-docs` from the commands' own help: change the help there, not this page. -->
"""


def commands(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for `command` and for all commands below it, in the order of its help; hidden ones left out."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = command.context_class(command, parent, info_name=name, **settings)
    yield context
    if not isinstance(command, click.Group):
        return
    for below in command.list_commands(context):
        found = command.get_command(context, below)
        if found is not None and not found.hidden:
            yield from commands(found, below, context)


def render(command: click.Command, name: str = "flexmoe") -> str:
    """The whole page: one section with the help text for each command."""
    sections = [
        f"## {context.command_path}\n\n```text\n{context.get_help().rstrip()}\n```\n"
        for context in commands(command, name)
    ]
    return "\n".join([HEADER, *sections])


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; return the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/cli.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    page = render(pkgutil.resolve_name("flexmoe.cli.main:main"))
    if not parser.parse_args(arguments).check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print("docs/cli.md is not what the command line says; write it anew with `make cli-docs`.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
