"""Recorded requests of real services. Enters: a file, also as .xz or .gz. Leaves: arrivals, lengths, shared blocks.

Two formats are told apart by their first line. Azure's CSV has the columns TIMESTAMP (a date and time), ContextTokens
and GeneratedTokens. Mooncake's JSON lines have `timestamp` (milliseconds), `input_length`, `output_length` and
`hash_ids`: one for each block of 512 tokens of the prompt, the same wherever the prompts are the same up to its end.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from flexmoe.errors import ConfigError

BLOCK_TOKENS = 512
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_KEYS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """arrival: seconds after the trace's first. Lengths in tokens. blocks: ids of the prompt's blocks, if known."""

    arrival: float
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path) -> list[TraceRequest]:
    """All requests, by arrival. Raises ConfigError with the line and the reason for what is in neither format."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            requests = list(_parse(file, path))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}.") from error
    if not requests:
        raise ConfigError(f"the trace {path} holds no request.")
    first = min(request.arrival for request in requests)
    shifted = (replace(request, arrival=request.arrival - first) for request in requests)
    return sorted(shifted, key=lambda request: request.arrival)


def _parse(file: TextIO, path: Path) -> Iterator[TraceRequest]:
    first = file.readline().strip()
    if first.startswith("{"):
        yield from _each(path, 1, io.StringIO(first), _mooncake)
        yield from _each(path, 2, file, _mooncake)
    elif set(_COLUMNS) <= set(columns := next(csv.reader([first]), [])):
        yield from _each(path, 2, file, lambda line: _azure(columns, next(csv.reader([line]))))
    else:
        raise ConfigError(
            f"the trace {path} is refused, line 1: neither a JSON object with {', '.join(_KEYS)} nor a CSV header with "
            f"{', '.join(_COLUMNS)}."
        )


def _each(path: Path, start: int, lines: TextIO, parse: Callable[[str], TraceRequest]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        try:
            yield parse(line.strip())
        except KeyError as error:
            raise ConfigError(f"the trace {path} is refused, line {number}: {error.args[0]} is missing.") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise ConfigError(f"the trace {path} is refused, line {number}: {error}.") from error


def _azure(columns: list[str], values: list[str]) -> TraceRequest:
    if len(values) != len(columns):
        raise ValueError(f"{len(values)} values, but {len(columns)} columns")
    arrival, prompt, answer = (values[columns.index(name)] for name in _COLUMNS)
    moment = datetime.fromisoformat(arrival)
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return TraceRequest(seconds, _length(int(prompt)), _length(int(answer)))


def _mooncake(line: str) -> TraceRequest:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    timestamp, prompt, answer = (row[name] for name in _KEYS)
    milliseconds = float(timestamp)
    if not math.isfinite(milliseconds):
        raise ValueError(f"timestamp={timestamp!r} is not a number of milliseconds")
    blocks = tuple(int(block) for block in row.get("hash_ids", ()))
    return TraceRequest(milliseconds / 1e3, _length(prompt), _length(answer), blocks)


def _length(tokens: Any) -> int:
    if type(tokens) is not int or tokens < 0:
        raise ValueError(f"{tokens!r} is not a number of tokens")
    return tokens
