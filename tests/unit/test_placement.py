"""planner/placement.py: replicas are shared out among layers as well as any way of sharing them could."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe.config.routing import LayerLoad
from flexmoe.planner.balance import balance, rank_imbalance, slots_per_rank
from flexmoe.planner.placement import place


def load(layer: int, counts: list[int]) -> LayerLoad:
    return LayerLoad("m", layer, 1, tuple(counts), 1, sum(counts), tuple(min(1, n) for n in counts))


LOADS = st.lists(st.lists(st.integers(0, 100), min_size=4, max_size=4), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(LOADS, st.integers(0, 5))
def test_no_other_way_to_share_the_room_is_better(counts: list[list[int]], room: int) -> None:
    loads = [load(layer, row) for layer, row in enumerate(counts)]
    placements = place(loads, 2, room)
    spent = sum(len(placements[one.layer].slots[0]) for one in loads)
    assert spent <= 2 * len(loads) + room
    cost = sum(rank_imbalance(one, placements[one.layer]) for one in loads)
    every = [
        [rank_imbalance(one, balance(one.counts, slots_per_rank(4, 2, spare))) for spare in range(min(room, 4) + 1)]
        for one in loads
    ]
    ways = itertools.product(*(range(len(choices)) for choices in every))
    best = min(sum(every[i][n] for i, n in enumerate(way)) for way in ways if sum(way) <= room)
    assert cost <= best + 1e-9


def test_the_layer_with_a_hot_expert_gets_the_replica() -> None:
    placements = place([load(0, [5, 5, 5, 5]), load(1, [97, 1, 1, 1])], 2, 1)
    assert len(placements[0].replicas(0)) == 1
    assert len(placements[1].replicas(0)) == 2


def test_without_layers_nothing_is_placed() -> None:
    assert place([], 2, 3) == {}
