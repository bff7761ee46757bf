"""What exchanging a tensor costs among ranks: the links of a machine, as layers of a model meet them.

    python benchmarks/collectives.py [--ranks 2] [--device cuda] [--sizes 4KiB-64MiB] [--out rows.jsonl]

All-reduce, all-gather, reduce-scatter and all-to-all of a bf16 tensor of `bytes` in all (of an all-gather the result),
one at a time: called from Python, and on GPUs as a CUDA graph of several, replayed. There also `one_shot`, the sum that
decode steps take where GPUs read each other's memory, with the addition to the residual stream and the norm that it
does as well. A figure is of the slowest rank.
`sent` is what a rank sends at least (docs/parallel.md), `gb_s` that over the time. A row is one JSON line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from flexmoe.bench.collectives import cases, rows
from flexmoe.bench.record import append, facts

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _sizes(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    return _bytes(least), _bytes(most or least)


def _bytes(text: str) -> int:
    number, unit = text[:-3], text[-3:]
    if unit not in _UNITS or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use for instance 64KiB or 4KiB-64MiB")
    return int(number) * _UNITS[unit]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=_sizes, default=(2**12, 2**26), help="from-to, in steps of four times")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


def measure(words: Sequence[str] | None = None) -> None:
    """Measure, print, and append rows."""
    args = arguments(words)
    shared = facts(torch.device(args.device))
    for found in rows(args.ranks, cases(args.device, *args.sizes)):
        row = found | shared
        what = f"{row['op']:>14} {row['bytes']:>9} bytes {row['mode']:>5}"
        print(f"{what}: {row['us']['median']:>10.1f} us {row['gb_s']:>7} GB/s", flush=True)
        if args.out:
            append(args.out, row)


if __name__ == "__main__":
    measure()
