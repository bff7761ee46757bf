"""balance: which expert goes to which rank. Enters: how often each was chosen. Leaves: an ExpertPlacement.

Greedy, in two steps. Replicate: each slot to spare goes to the expert whose replicas have the most to do. Pack: the
heaviest replica first, each to the rank with the least to do that has room and does not hold that expert yet
(longest processing time first). Both are as in DeepSeek's EPLB; here ranks may have slots of different numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.routing import LayerLoad, imbalance, rank_loads
from flexmoe.errors import ConfigError


def balance(counts: Sequence[int], slots: Sequence[int]) -> ExpertPlacement:
    """Place E experts with loads counts [E] on ranks that have slots [P] places each.

    Where the contiguous placement has room, the result's largest rank load (`rank_loads`) is never above its. A slot
    stays empty if every rank with room holds the experts that a replica could help.

    Raises ConfigError if there are fewer slots than experts.
    """
    if sum(slots) < len(counts) or min(slots, default=-1) < 0:
        raise ConfigError(
            f"{len(counts)} experts need as many slots, but ranks have {list(slots)}; use fewer ranks or spare slots."
        )
    # A second replica on a rank is of no use.
    best = _pack(counts, _replicate(counts, sum(slots), sum(1 for s in slots if s)), slots)
    plain = ExpertPlacement.contiguous(len(counts), len(slots))
    fits = all(len(held) <= room for held, room in zip(plain.slots, slots, strict=True))
    return plain if fits and max(rank_loads(counts, plain)) < max(rank_loads(counts, best)) else best


def slots_per_rank(num_experts: int, ranks: int, spare: int = 0) -> list[int]:
    """Slots of each rank: what the contiguous placement needs, and `spare` more."""
    return [len(held) + spare for held in ExpertPlacement.contiguous(num_experts, ranks).slots]


def balanced_plan(
    loads: Iterable[LayerLoad], ranks: int, spare_slots: int = 0, moe_dispatch: str = "auto"
) -> ParallelPlan:
    """A plan that spreads whole experts over `ranks`, each layer by its own load. Layers without one: contiguous.

    Raises ConfigError where a rank would hold no expert.
    """
    placements: dict[int | None, ExpertPlacement] = {}
    for load in loads:
        num_experts = len(load.counts)
        if ranks > num_experts and not spare_slots:
            raise ConfigError(
                f"{ranks} ranks for {num_experts} experts: a rank would hold none; use at most {num_experts} ranks, or "
                "spare slots."
            )
        placements[load.layer] = balance(load.counts, slots_per_rank(num_experts, ranks, spare_slots))
    return ParallelPlan(
        tensor_parallel_size=ranks, expert_parallel_size=ranks, moe_dispatch=moe_dispatch, placements=placements
    )


def rank_imbalance(load: LayerLoad, placement: ExpertPlacement) -> float:
    """Largest over mean of what the ranks have to do."""
    return imbalance(rank_loads(load.counts, placement))


def _replicate(counts: Sequence[int], num_slots: int, most: int) -> list[int]:
    """How many replicas each expert gets. most: of one expert."""
    replicas = [1] * len(counts)
    heap = [(-float(count), expert) for expert, count in enumerate(counts)]
    heapq.heapify(heap)
    for _ in range(num_slots - len(counts)):
        while heap and replicas[heap[0][1]] >= most:
            heapq.heappop(heap)
        if not heap:
            break
        expert = heap[0][1]
        replicas[expert] += 1
        heapq.heapreplace(heap, (-counts[expert] / replicas[expert], expert))
    return replicas


def _pack(counts: Sequence[int], replicas: Sequence[int], slots: Sequence[int]) -> ExpertPlacement:
    """Heaviest first, to the lightest rank; of equal ranks to the one with the most room."""
    held: list[set[int]] = [set() for _ in slots]
    loads = [0.0] * len(slots)
    items = [(counts[e] / replicas[e], e) for e in range(len(counts)) for _ in range(replicas[e])]
    for share, expert in sorted(items, key=lambda item: (-item[0], item[1])):
        fitting = [r for r, room in enumerate(slots) if len(held[r]) < room and expert not in held[r]]
        if fitting:
            rank = min(fitting, key=lambda r: (loads[r], len(held[r]) - slots[r], r))
            held[rank].add(expert)
            loads[rank] += share
    return ExpertPlacement(len(counts), tuple(tuple(sorted(experts)) for experts in held))
