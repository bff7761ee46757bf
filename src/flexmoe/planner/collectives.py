"""What exchanging a tensor among ranks takes. Enters: a machine, ranks and bytes. Leaves: seconds.

Measured points go first, with straight lines between them on logarithmic scales; then latency and bandwidth of the
link. Ranks on several nodes exchange inside of each node, then between nodes what is left, as NCCL does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from flexmoe.config.machine import Exchange, Link, Machine

_WHOLE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}  # times (P - 1) / P


def exchange_seconds(
    machine: Machine, op: str, ranks: Sequence[int], num_bytes: float, *, captured: bool = False
) -> float:
    """num_bytes: of the whole tensor, of an all-gather the result. captured: in a CUDA graph."""
    if len(ranks) < 2:
        return 0.0
    per_node = machine.devices_per_node
    nodes = {rank // per_node for rank in ranks}
    inside = len(ranks) // len(nodes)
    outer = machine.link(tuple(ranks))
    if op in ("send", "one_shot") or len(nodes) == 1 or inside == 1 or machine.is_shared:
        return link_seconds(outer, op, len(ranks), num_bytes, captured=captured)
    inner = machine.link(tuple(rank for rank in ranks if rank // per_node == min(nodes)))
    between = link_seconds(outer, op, len(nodes), num_bytes / inside, captured=captured)
    return between + link_seconds(inner, op, inside, num_bytes, captured=captured)


def link_seconds(link: Link, op: str, ranks: int, num_bytes: float, *, captured: bool) -> float:
    """Of one collective over one link, among so many ranks."""
    points = _points(link, op, ranks, captured=captured)
    if points:
        nearest = points[0].ranks
        return (
            _interpolated(points, num_bytes)
            * _formula(link, op, ranks, num_bytes)
            / _formula(link, op, nearest, num_bytes)
        )
    return _formula(link, op, ranks, num_bytes)


def _formula(link: Link, op: str, ranks: int, num_bytes: float) -> float:
    """A rank sends at least its part of the tensor. Each doubling of the ranks adds half a latency, but not where all
    read each other's memory at once.
    """
    if op in ("send", "one_shot"):
        return link.latency_s + max(1, ranks - 1) * num_bytes / link.bandwidth
    rounds = 0.5 + 0.5 * math.log2(max(2, ranks))
    return link.latency_s * rounds + _WHOLE[op] * (ranks - 1) / ranks * num_bytes / link.bandwidth


def _points(link: Link, op: str, ranks: int, *, captured: bool) -> list[Exchange]:
    """What was measured of the number of ranks nearest to this one, smallest tensor first."""
    alike = [e for e in link.measured if e.op == op]
    alike = [e for e in alike if e.captured == captured] or alike
    if not alike:
        return []
    nearest = min({e.ranks for e in alike}, key=lambda n: (abs(math.log(n / ranks)), n))
    return sorted((e for e in alike if e.ranks == nearest), key=lambda e: e.num_bytes)


def _interpolated(points: Sequence[Exchange], num_bytes: float) -> float:
    """Below the smallest as long as it, above the largest as fast as it."""
    if num_bytes <= points[0].num_bytes:
        return points[0].seconds
    for low, high in itertools.pairwise(points):
        if num_bytes <= high.num_bytes:
            part = math.log(num_bytes / low.num_bytes) / math.log(high.num_bytes / low.num_bytes)
            return math.exp((1 - part) * math.log(low.seconds) + part * math.log(high.seconds))
    return points[-1].seconds * num_bytes / points[-1].num_bytes
