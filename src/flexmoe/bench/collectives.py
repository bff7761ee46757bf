"""What exchanging a tensor costs among ranks of this machine. Enters: cases. Leaves: microseconds, of the slowest rank.

All-reduce, all-gather, reduce-scatter and all-to-all of a bf16 tensor of `bytes` in all (of an all-gather the result),
one at a time: called from Python, and on GPUs as a CUDA graph of several, replayed. There also `one_shot`, the sum of
decode steps where GPUs read each other's memory. Ranks are processes of this module.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flexmoe.config.machine import Exchange, Link
from flexmoe.errors import ConfigError
from flexmoe.parallel import mesh as meshes
from flexmoe.parallel.comm import Group, Traffic
from flexmoe.parallel.launch import spawn
from flexmoe.parallel.peers import share, why_not_shared
from flexmoe.parallel.rank import Setup, main
from flexmoe.parallel.supervisor import Supervisor

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
ONE_SHOT = "one_shot"
_ONE_SHOT_HIDDEN, _ONE_SHOT_MOST = 4096, 2**22  # a row; bytes
_TIMEOUT = 60.0
_SAMPLES, _CALLS = 10, 20  # a sample is the mean of so many calls, of fewer where they are long
_SAMPLE_BYTES = 64 * 2**20
_SIZES = {"cuda": (2**12, 2**26), "cpu": (2**10, 2**24)}


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
    if case.op == ONE_SHOT:
        return _one_shot(case, group, device)
    rows = case.num_bytes // 2
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
    """As steps do it, with the addition to the residual stream and the norm: two memories in turn."""
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


def cases(device: str, least: int, most: int) -> Iterator[Case]:
    """All operations, of sizes in steps of four times."""
    size = least
    while size <= most:
        for op in OPS + ((ONE_SHOT,) if device == "cuda" and size <= _ONE_SHOT_MOST else ()):
            for captured in (False, True) if device == "cuda" else (False,):
                yield Case(op, size, captured, device)
        size *= 4


def rows(ranks: int, wanted: Iterable[Case]) -> Iterator[dict[str, Any]]:
    """Of each case one after the other, among so many new processes."""
    supervisor = Supervisor(spawn(__name__, ranks, _TIMEOUT), _TIMEOUT, str)
    try:
        for case in wanted:
            number = supervisor.post("measure", astuple(case), "measuring", owed=range(ranks))
            yield _row(case, ranks, list(supervisor.wait(number).values()))
    finally:
        supervisor.close()


def rank_counts(ranks: int) -> list[int]:
    """2, 4 ... and so many."""
    return sorted({2**power for power in range(1, ranks.bit_length()) if 2**power <= ranks} | {ranks})


def measured_links(ranks: int, device: str, notify: Callable[[str], None]) -> tuple[Link, ...]:
    """One link: what 2, 4 ... and so many ranks took."""
    found: list[dict[str, Any]] = []
    for count in rank_counts(ranks):
        notify(f"exchanges among {count} ranks")
        found += rows(count, cases(device, *_SIZES[device]))
    return (link_of("nvlink or pcie" if device == "cuda" else "memory", 0, found),)


def link_of(name: str, size: int, measured: Iterable[dict[str, Any]]) -> Link:
    """The link that rows are of: their points, and latency and bandwidth as the all-reduce of fewest ranks saw them."""
    exchanges = [
        Exchange(row["op"], row["ranks"], row["bytes"], row["us"]["median"] * 1e-6, row["mode"] == "graph")
        for row in measured
    ]
    fewest = min(exchange.ranks for exchange in exchanges)
    sums = [exchange for exchange in exchanges if exchange.op == "all_reduce" and exchange.ranks == fewest]
    sent = [2 * (fewest - 1) / fewest * exchange.num_bytes / exchange.seconds for exchange in sums]
    return Link(name, size, min(exchange.seconds for exchange in sums), max(sent), tuple(exchanges))


def _row(case: Case, ranks: int, found: Sequence[Measured]) -> dict[str, Any]:
    us, sent = max(found, key=lambda measured: float(np.median(measured[0])))  # of the slowest rank
    p20, median, p80 = (round(float(value), 2) for value in np.percentile(us, (20, 50, 80)))
    return {
        "benchmark": "collectives", "op": case.op, "ranks": ranks, "bytes": case.num_bytes, "dtype": "bfloat16",
        "mode": "graph" if case.captured else "eager", "us": {"median": median, "p20": p20, "p80": p80},
        "samples": _SAMPLES, "sent": sent, "gb_s": round(sent / median / 1e3, 2),
    }  # fmt: skip
