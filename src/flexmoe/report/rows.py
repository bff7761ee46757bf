"""Recorded rows and the numbers in them. Enters: JSON-lines files. Leaves: Rows, and Values that know their cells."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.config.machine import machine_text
from flexmoe.errors import ConfigError

CITED = Path(__file__).with_name("cited.jsonl")
DEFAULT_FOLDER = Path("benchmarks/results")


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of one recorded line. key: its path in the row, e.g. "result.ms".

    line 0: of a machine that comes with the package, whose name `file` is.
    """

    file: str
    line: int
    key: str


@dataclass(frozen=True, slots=True)
class Value:
    """A number that is shown, and the cells that it is computed from. formula: how, of a, b ... in their order."""

    number: float
    cells: tuple[Cell, ...]
    formula: str = "a"

    def over(self, other: Value) -> Value:
        """This divided by the other. Both must be plain cells."""
        return Value(self.number / other.number, self.cells + other.cells, "a / b")


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded line."""

    file: str
    line: int
    data: dict[str, Any]

    def get(self, key: str) -> Any:
        """What stands at a path such as "params.batch" or "samples.0"; None if it is not there."""
        found: Any = self.data
        for name in key.split("."):
            if isinstance(found, list):
                found = found[int(name)] if int(name) < len(found) else None
            else:
                found = found.get(name) if isinstance(found, dict) else None
        return found

    def value(self, key: str) -> Value:
        """The number at a path."""
        return Value(float(self.get(key)), (Cell(self.file, self.line, key),))

    @property
    def is_cited(self) -> bool:
        """Taken from elsewhere, not measured with our rows."""
        return bool(self.data.get("cited"))


def read_rows(files: Sequence[Path], *, root: Path | None = None) -> list[Row]:
    """All lines of the files in order. root: file names are told from there.

    Raises ConfigError for a file that is not there, and for a line that is no JSON object.
    """
    return [row for file in files for row in _read(file, root or Path.cwd())]


def default_files() -> list[Path]:
    """The rows of this checkout. Raises ConfigError outside of one."""
    files = sorted(DEFAULT_FOLDER.glob("*.jsonl"))
    if not files:
        raise ConfigError(f"no rows in {DEFAULT_FOLDER}/ here; run in a checkout, or name files with --rows.")
    return files


def newest(rows: Iterable[Row], keys: Sequence[str]) -> list[Row]:
    """Of rows that agree in all `keys` the latest, in the order in which the first of each came."""
    chosen: dict[str, Row] = {}
    for row in rows:
        name = json.dumps([row.get(key) for key in keys])
        if name not in chosen or str(row.get("time")) >= str(chosen[name].get("time")):
            chosen[name] = row
    return list(chosen.values())


def cell_number(cell: Cell, root: Path) -> float:
    """Read a cell again from its file."""
    if cell.line == 0:
        return Row(cell.file, 0, json.loads(machine_text(cell.file))).value(cell.key).number
    path = CITED if cell.file == CITED.name else root / cell.file
    line = path.read_text(encoding="utf-8").splitlines()[cell.line - 1]
    return Row(cell.file, cell.line, json.loads(line)).value(cell.key).number


def _read(file: Path, root: Path) -> Iterator[Row]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"rows={file} is not text in UTF-8; give a file of JSON lines.") from error
    except OSError as error:
        raise ConfigError(f"rows={file} cannot be read ({error.strerror}); give a file of JSON lines.") from error
    name = _name(file, root)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}:{number} is no JSON; each line must be one row.") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{file}:{number} is no JSON object; each line must be one row.")
        yield Row(name, number, data)


def _name(file: Path, root: Path) -> str:
    if file == CITED:
        return CITED.name
    path = file.resolve()
    return path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else path.as_posix()
