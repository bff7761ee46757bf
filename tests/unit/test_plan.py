"""ExpertPlacement and ParallelPlan: every expert has a slot, replicas are found, and what is missing is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.errors import ConfigError


@given(num_experts=st.integers(1, 200), ranks=st.integers(1, 40))
def test_contiguous_spreads_experts_in_order_and_evenly(num_experts: int, ranks: int) -> None:
    placement = ExpertPlacement.contiguous(num_experts, ranks)
    in_order = [expert for rank in range(ranks) for expert in placement.local_slots(rank)]
    assert in_order == list(range(num_experts))
    sizes = [len(placement.local_slots(rank)) for rank in range(ranks)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_contiguous_by_hand() -> None:
    assert ExpertPlacement.contiguous(3) == ExpertPlacement(3, ((0, 1, 2),))
    assert ExpertPlacement.contiguous(8, 3).slots == ((0, 1, 2), (3, 4, 5), (6, 7))
    assert ExpertPlacement.contiguous(2, 3).slots == ((0,), (1,), ())


def test_slots_of_finds_every_replica_on_a_rank() -> None:
    placement = ExpertPlacement(4, ((2, 0, 2), (), (3, 1, 1, 0)))  # uneven, one rank empty, experts out of order
    assert placement.local_slots(0) == (2, 0, 2)
    assert [placement.slots_of(expert, 0) for expert in range(4)] == [(1,), (), (0, 2), ()]
    assert [placement.slots_of(expert, 1) for expert in range(4)] == [(), (), (), ()]
    assert [placement.slots_of(expert, 2) for expert in range(4)] == [(3,), (1, 2), (), (0,)]


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (((0, 1), (3,)), "missing [2], unknown []"),
        (((),), "missing [0, 1, 2, 3], unknown []"),
        ((), "missing [0, 1, 2, 3], unknown []"),
        (((0, 1, 2, 3, 4),), "missing [], unknown [4]"),
        (((-1, 0, 1, 2),), "missing [3], unknown [-1]"),
    ],
)
def test_every_expert_must_be_somewhere(slots: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        ExpertPlacement(4, slots)
    assert str(error.value) == f"ExpertPlacement of 4 experts: {words}; place each expert 0..3 at least once."


def test_a_plan_places_experts_by_its_expert_parallel_degree() -> None:
    assert ParallelPlan().placement(8) == ExpertPlacement.contiguous(8)
    assert ParallelPlan(4, expert_parallel_size=4).placement(6).slots == ((0, 1), (2, 3), (4,), (5,))
    assert ParallelPlan(tensor_parallel_size=4).placement(6).slots == ((0, 1, 2, 3, 4, 5),)
