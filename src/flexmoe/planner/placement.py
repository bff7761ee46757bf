"""placement: which layers get replicas of hot experts. Enters: recorded loads, room for experts. Leaves: placements.

Room is scarce and layers differ: one may be even already, another be held up by a single expert. So the slots to spare
of a rank are shared out among the layers of its stage by dynamic programming, exactly: `best[used]` is the least sum of
imbalances that the layers so far can have with `used` slots, and every layer adds each number of slots it may take.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexmoe.config.plan import ExpertPlacement
from flexmoe.config.routing import LayerLoad
from flexmoe.planner.balance import balance, rank_imbalance, slots_per_rank

MOST_SPARE = 4  # slots that one layer may take on each rank


def place(loads: Sequence[LayerLoad], ranks: int, room: int) -> dict[int | None, ExpertPlacement]:
    """Placements of one stage's layers over `ranks`, with at most `room` replicas on each rank, of all layers together.

    The sum over layers of the ranks' imbalance is the least that `balance` can give.
    """
    options = [_options(load, ranks, min(room, MOST_SPARE)) for load in loads]
    spares = _share_out([[cost for cost, _ in choices] for choices in options], room)
    return {load.layer: options[at][spare][1] for at, (load, spare) in enumerate(zip(loads, spares, strict=True))}


def _options(load: LayerLoad, ranks: int, most: int) -> list[tuple[float, ExpertPlacement]]:
    """A layer's imbalance and placement with 0, 1, 2 ... spare slots on each rank."""
    placements = [balance(load.counts, slots_per_rank(len(load.counts), ranks, spare)) for spare in range(most + 1)]
    return [(rank_imbalance(load, placement), placement) for placement in placements]


def _share_out(costs: Sequence[Sequence[float]], room: int) -> list[int]:
    """How many slots each layer takes, so that the costs add up to the least within the room. costs[layer][slots]."""
    best = [0.0] * (room + 1)
    taken: list[list[int]] = []
    for choices in costs:
        ways = [
            min((best[used - spare] + cost, spare) for spare, cost in enumerate(choices) if spare <= used)
            for used in range(room + 1)
        ]
        best = [cost for cost, _ in ways]
        taken.append([spare for _, spare in ways])
    spares, used = [], room
    for chosen in reversed(taken):
        spares.append(chosen[used])
        used -= chosen[used]
    return spares[::-1]
