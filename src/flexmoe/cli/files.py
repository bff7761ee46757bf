"""Files that commands read and write. Enters: names. Leaves: text; a path that can be written, before work begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import click

from flexmoe.errors import ConfigError


class OutputFile(click.Path):
    """A file to write at the end. Its folder is made now: minutes of measuring should not end in a refusal."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.fail(f"{str(path)!r} cannot be written: the folder {path.parent}: {error.strerror}.", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"{str(path)!r} cannot be written: nor may anything in {path.parent}.", param, ctx)
        return path


OUTPUT = OutputFile()


def text_of(file: str | Path | IO[str]) -> str:
    """What a file says. Raises ConfigError if it is no text."""
    name = file if isinstance(file, (str, Path)) else file.name
    try:
        return Path(file).read_text(encoding="utf-8") if isinstance(file, (str, Path)) else file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not text in UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}.") from error
