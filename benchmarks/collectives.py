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
import itertools
import sys
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flexmoe.bench.record import append, facts
from flexmoe.errors import ConfigError
from flexmoe.parallel import mesh as meshes
from flexmoe.parallel.comm import Group, Traffic
from flexmoe.parallel.launch import spawn
from flexmoe.parallel.peers import share, why_not_shared
from flexmoe.parallel.rank import Setup, main
from flexmoe.parallel.supervisor import Supervisor

_OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_ONE_SHOT_HIDDEN, _ONE_SHOT_MOST = 4096, 2**22  # a row; bytes
_TIMEOUT = 60.0
_SAMPLES, _CALLS = 10, 20  # a sample is the mean of so many calls, of fewer where they are long
_SAMPLE_BYTES = 64 * 2**20
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured. num_bytes: of the whole tensor. It travels as a tuple, since ranks know this module by name."""

    op: str
    num_bytes: int
    captured: bool
    device: str


Measured = tuple[list[float], float]  # of one rank: microseconds a call, sample by sample; bytes sent in one


class Rank:
    """Measures cases as they are told to all ranks."""

    def __init__(self, setup: Setup, beats: MutableSequence[int]) -> None:
        self._setup, self._beats = setup, beats

    def handle(self, command: str, payload: Any) -> Measured:
        """The only command is to measure a case."""
        assert command == "measure"
        case = Case(*payload)
        device = torch.device(f"cuda:{self._setup.local_rank}" if case.device == "cuda" else "cpu")
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            setup = self._setup
            meshes.join(setup.host, setup.port, setup.rank, setup.size, device, setup.timeout)
        return self._measure(case, device)

    def close(self) -> None:
        """Leave the world."""
        meshes.leave()

    def _measure(self, case: Case, device: torch.device) -> Measured:
        traffic = Traffic(beats=self._beats)
        group = Group(self._setup.size, self._setup.rank, dist.group.WORLD, traffic)
        call = _call(case, group, device)
        call()
        sent = sum(traffic.take().values())
        calls = max(1, min(_CALLS, _SAMPLE_BYTES // case.num_bytes))
        run = _captured(call, calls) if case.captured else lambda: [call() for _ in range(calls)]
        run()
        us = []
        for _ in range(_SAMPLES):
            group.minimum(0, device)  # all begin together
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            us.append(1e6 * (time.perf_counter() - start) / calls)
        return us, sent


def _call(case: Case, group: Group, device: torch.device) -> Callable[[], Any]:
    rows = case.num_bytes // 2
    if case.op == "one_shot":
        return _one_shot(case, group, device)
    x = torch.zeros(rows, dtype=torch.bfloat16, device=device)
    if case.op == "all_gather":
        part = x[: rows // group.size].clone()
        return lambda: group.all_gather(part, case.op)
    if case.op == "all_to_all":
        even = [rows // group.size] * group.size
        x = x[: sum(even)].clone()
        return lambda: group.all_to_all(x, even, even, case.op)
    if case.op == "reduce_scatter":
        x = x[: rows // group.size * group.size].clone()
        return lambda: group.reduce_scatter(x, case.op)
    return lambda: group.all_reduce(x, case.op)


def _one_shot(case: Case, group: Group, device: torch.device) -> Callable[[], Any]:
    """As steps do it: two memories in turn."""
    from flexmoe.kernels.triton.all_reduce import PeerRows, all_reduce  # Triton: on GPUs only
    from flexmoe.kernels.triton.norm_linear import NormAfter

    why_not = why_not_shared(group, device, one_machine=True)
    if why_not:
        raise ConfigError(why_not)
    hidden = min(_ONE_SHOT_HIDDEN, case.num_bytes // 2)
    rows = case.num_bytes // 2 // hidden
    peers = []
    for _ in range(2):
        shared = share(group, rows, hidden, torch.bfloat16, device)
        shared.own.zero_()
        peers.append(PeerRows(shared.own, shared.rows, shared.flags, group.index))
    x, normed = (torch.zeros(rows, hidden, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    norm = NormAfter(torch.ones(hidden, dtype=torch.bfloat16, device=device), 1e-5, normed)
    turns = itertools.cycle(peers)
    sent = (group.size - 1) * case.num_bytes

    def call() -> None:
        group.traffic.count(case.op, sent)
        all_reduce(next(turns), x, accumulate=True, norm=norm, pdl=True)

    return call


def _captured(call: Callable[[], Any], calls: int) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    return graph.replay


def run() -> None:
    """The program of a rank."""
    main(Rank, sys.argv[1:])


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cases, one after the other."""
    shared = facts(torch.device(args.device))
    ranks = Supervisor(spawn(Path(__file__).stem, args.ranks, _TIMEOUT), _TIMEOUT, str)
    try:
        for case in _cases(args):
            number = ranks.post("measure", astuple(case), "measuring", owed=range(args.ranks))
            yield _row(case, args.ranks, list(ranks.wait(number).values())) | shared
    finally:
        ranks.close()


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    size, most = args.sizes
    while size <= most:
        for op in _OPS + (("one_shot",) if args.device == "cuda" and size <= _ONE_SHOT_MOST else ()):
            for captured in (False, True) if args.device == "cuda" else (False,):
                yield Case(op, size, captured, args.device)
        size *= 4


def _row(case: Case, ranks: int, found: Sequence[Measured]) -> dict[str, Any]:
    us, sent = max(found, key=lambda measured: float(np.median(measured[0])))  # of the slowest rank
    p20, median, p80 = (round(float(value), 2) for value in np.percentile(us, (20, 50, 80)))
    return {
        "benchmark": "collectives", "op": case.op, "ranks": ranks, "bytes": case.num_bytes, "dtype": "bfloat16",
        "mode": "graph" if case.captured else "eager", "us": {"median": median, "p20": p20, "p80": p80},
        "samples": _SAMPLES, "sent": sent, "gb_s": round(sent / median / 1e3, 2),
    }  # fmt: skip


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
    for row in rows(args):
        what = f"{row['op']:>14} {row['bytes']:>9} bytes {row['mode']:>5}"
        print(f"{what}: {row['us']['median']:>10.1f} us {row['gb_s']:>7} GB/s", flush=True)
        if args.out:
            append(args.out, row)


if __name__ == "__main__":
    measure()
