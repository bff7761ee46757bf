"""Time kernels the way they run in a decode step: inside a CUDA graph, on buffers that no cache still holds.

    python benchmarks/kernels/<op>.py [--filter REGEX] [--limit-seconds S] [--out rows.jsonl]

Enters: cases, each a closure for every one of its rotating sets of buffers. Leaves: a table in which cases of one name
compete, best first, and one JSON row a case. "%" is of the read-only bandwidth, measured at the start.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.kernel_timer import Launch, Timing, time_launches
from flexmoe.bench.record import append, facts


@dataclass(frozen=True)
class Case:
    """One way to compute one thing. Cases with the same name compete; params says what sets them apart.

    bytes_moved: by one launch, at least, read and written. launches: makes the buffers, rotating sets of them that
    together exceed the cache twice over, and returns one closure for each set.
    """

    name: str
    params: dict[str, Any]
    bytes_moved: int
    launches: Callable[[], list[Launch]]


def run(op: str, cases: Iterable[Case]) -> None:
    """Time all cases that the command line asks for, print a table, and append rows to the file it names."""
    if not torch.cuda.is_available():
        sys.exit(f"The benchmark of {op} needs a CUDA device, and torch {torch.__version__} finds none.")
    args = _arguments(op)
    device = torch.device("cuda", torch.cuda.current_device())
    ceiling = read_bandwidth(device)
    shared = facts(device) | {"benchmark": "kernel", "op": op, "ceiling_gb_s": round(ceiling / 1e9)}
    print(f"{op} on {shared['device']['name']}: a plain read reaches {ceiling / 1e9:,.0f} GB/s", flush=True)
    rows: list[dict[str, Any]] = []
    wanted = (case for case in cases if re.search(args.filter, f"{case.name} {_words(case.params)}"))
    for case, timing in _measured(wanted, args):
        rows.append(_row(case, timing, ceiling))
        if args.out:
            append(args.out, shared | rows[-1])
    _print(rows, args.top)


def _measured(cases: Iterable[Case], args: argparse.Namespace) -> Iterator[tuple[Case, Timing]]:
    """Every case that runs; one that fails is told in a line. Stops in good time, or where the device is lost."""
    end = time.monotonic() + args.limit_seconds
    todo = iter(cases)
    while batch := list(itertools.islice(todo, args.compile_threads)):
        _compile(batch)
        for case in batch:
            if time.monotonic() > end:
                print(f"stopped after {args.limit_seconds:g} s, before {case.name} {_words(case.params)}", flush=True)
                return
            try:
                timing = time_launches(case.launches())
            except Exception as error:  # noqa: BLE001 - whatever a candidate raises, the others shall run
                _tell(case, error)
            else:
                yield case, timing


def _compile(batch: list[Case]) -> None:
    """Compile in several threads at once, by one launch each: most of it is not Python and needs no lock."""
    with ThreadPoolExecutor(len(batch)) as pool:
        list(pool.map(_try_once, batch))
    torch.cuda.synchronize()


def _try_once(case: Case) -> None:
    # What fails here fails again when it is timed, and is told then.
    with contextlib.suppress(Exception):
        case.launches()[0]()


def _tell(case: Case, error: Exception) -> None:
    """Say what failed, and free what it held. Raises the error if the device takes no more work after it."""
    told = str(error).strip().splitlines()
    print(f"failed: {case.name} {_words(case.params)}: {type(error).__name__} {told[0] if told else ''}", flush=True)
    error.__traceback__ = None  # its frames hold buffers
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()


def _row(case: Case, timing: Timing, ceiling: float) -> dict[str, Any]:
    speed = case.bytes_moved / timing.median * 1e6  # bytes a second
    return {
        "name": case.name,
        "params": _plain(case.params),
        "bytes": case.bytes_moved,
        "us": round(timing.median, 3),
        "p20": round(timing.p20, 3),
        "p80": round(timing.p80, 3),
        "gb_s": round(speed / 1e9, 1),
        "percent": round(100 * speed / ceiling, 1),
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _words(params: Mapping[str, Any]) -> str:
    """Parameters on one line; those of a tile stand for themselves."""
    words = []
    for key, value in params.items():
        plain = _plain(value)
        words.append(_words(plain) if isinstance(plain, dict) else f"{key}={plain}")
    return " ".join(words)


def _print(rows: list[dict[str, Any]], top: int) -> None:
    """Cases of one name together, the quickest first, at most `top` of them."""
    for name in dict.fromkeys(row["name"] for row in rows):
        same = sorted((row for row in rows if row["name"] == name), key=lambda row: float(row["us"]))
        print(f"\n{name}: {same[0]['bytes'] / 1e6:.3f} MB, {len(same)} cases")
        print("       us      p20      p80     GB/s      %")
        for row in same[:top]:
            figures = (row["us"], row["p20"], row["p80"])
            numbers = " ".join(f"{figure:8.2f}" for figure in figures)
            print(f" {numbers} {row['gb_s']:8.0f} {row['percent']:6.1f}  {_words(row['params'])}")


def _arguments(op: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Time {op} on a GPU.")
    parser.add_argument("--filter", default="", help="run cases in whose name or parameters this is found")
    parser.add_argument("--limit-seconds", type=float, default=300, help="start no case after so long (default: 300)")
    parser.add_argument("--out", type=Path, help="file to append one JSON row a case to")
    parser.add_argument("--top", type=int, default=8, help="rows of the table for each name (default: 8)")
    parser.add_argument("--compile-threads", type=int, default=min(8, os.cpu_count() or 1), help="1: in turn")
    return parser.parse_args()
