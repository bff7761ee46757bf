"""Loads and the balancer: every expert placed, budgets kept, never worse than contiguous, recordings read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.routing import LayerLoad, imbalance, rank_active, rank_loads, read_recording, write_recording
from flexmoe.errors import ConfigError
from flexmoe.planner.balance import balance, balanced_plan, rank_imbalance, slots_per_rank

COUNTS = st.lists(st.integers(0, 10**6) | st.sampled_from([0, 1, 10**9]), min_size=1, max_size=40)


def load(layer: int, *counts: int, model: str = "m", passes: int = 2) -> LayerLoad:
    return LayerLoad(model, layer, 2, counts, passes, sum(counts) // 2, tuple(min(n, passes) for n in counts))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Counts, and slots of ranks that hold all experts somehow."""
    counts = draw(COUNTS)
    slots = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    return counts, [*slots, max(0, len(counts) - sum(slots))]


@given(cases())
def test_every_expert_is_placed_once_a_rank_within_the_budgets(case: tuple[list[int], list[int]]) -> None:
    counts, slots = case
    placement = balance(counts, slots)  # which itself refuses to miss an expert
    assert [len(held) <= room for held, room in zip(placement.slots, slots, strict=True)] == [True] * len(slots)
    assert all(len(set(held)) == len(held) for held in placement.slots)
    assert sum(rank_loads(counts, placement)) == pytest.approx(sum(counts))
    assert placement == balance(counts, slots)


@given(counts=COUNTS, ranks=st.integers(1, 9), spare=st.integers(0, 4))
def test_never_worse_than_contiguous(counts: list[int], ranks: int, spare: int) -> None:
    placement = balance(counts, slots_per_rank(len(counts), ranks, spare))
    plain = ExpertPlacement.contiguous(len(counts), ranks)
    assert max(rank_loads(counts, placement)) <= max(rank_loads(counts, plain))


@given(counts=COUNTS, ranks=st.integers(1, 6))
def test_with_room_for_everything_the_load_is_even(counts: list[int], ranks: int) -> None:
    placement = balance(counts, [len(counts)] * ranks)
    assert imbalance(rank_loads(counts, placement)) == pytest.approx(1)


def test_by_hand() -> None:
    """Without spare slots the two hot ones part; with one a rank the two hottest are everywhere."""
    assert balance([9, 8, 1, 2], [2, 2]).slots == ((0, 2), (1, 3))
    assert balance([90, 4, 3, 3], [3, 3]).slots == ((0, 1, 2), (0, 1, 3))
    assert rank_loads([9, 8, 1, 2], ExpertPlacement(4, ((0, 2, 1), (0, 3)))) == [13.5, 6.5]


def test_equal_loads_fill_all_ranks() -> None:
    for counts in ([0] * 8, [5] * 8):
        assert [len(held) for held in balance(counts, [2] * 4).slots] == [2] * 4


def test_imbalance() -> None:
    assert imbalance([1, 1, 1]) == 1
    assert imbalance([0, 0, 6]) == 3
    assert imbalance([0, 0]) == imbalance([]) == 1


def test_experts_that_ranks_read() -> None:
    """Layer of 2 passes; expert 2 was chosen once, so that its two replicas have half a token each."""
    found = load(0, 9, 0, 1, 2)
    assert rank_active(found, ExpertPlacement.contiguous(4, 2)) == [1, 1.5]
    assert rank_active(found, ExpertPlacement(4, ((0, 1, 2), (0, 2, 3)))) == [1.25, 2.25]
    assert rank_active(load(0, 0, 0, passes=0), ExpertPlacement.contiguous(2, 2)) == [0, 0]


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 experts need as many slots, but ranks have \[2, 2\]"):
        balance([1] * 5, [2, 2])
    with pytest.raises(ConfigError, match="8 ranks for 4 experts"):
        balanced_plan([load(0, 1, 2, 3, 4)], 8)


def test_a_plan_places_each_layer_by_its_own_load(tmp_path: Path) -> None:
    loads = [load(0, 9, 8, 1, 2), load(2, 1, 9, 1, 9)]
    plan = balanced_plan(loads, 2, moe_dispatch="all_to_all")
    assert plan.placement(4, 0).slots == ((0, 2), (1, 3))
    assert plan.placement(4, 1) == ExpertPlacement.contiguous(4, 2)
    assert (plan.num_ranks, plan.expert_parallel_size, plan.uses_all_to_all) == (2, 2, True)
    assert [rank_imbalance(found, plan.placement(4, found.layer)) for found in loads] == [1, 1]
    plan.write(tmp_path / "plan.json")
    assert ParallelPlan.read(tmp_path / "plan.json") == plan


def test_more_ranks_than_experts_take_replicas() -> None:
    placement = balanced_plan([load(0, 8, 1)], 4, 1).placement(2, 0)
    assert all(placement.slots)
    assert rank_imbalance(load(0, 8, 1), placement) < 2


def test_a_recording_is_read_back_and_several_are_added(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    loads = [load(1, 3, 1), load(3, 0, 4)]
    write_recording(path, loads)
    assert read_recording(path) == loads
    assert loads[0].mean_active == 1.5
    path.write_text(path.read_text() * 2 + "\n")
    assert read_recording(path) == [load.plus(load) for load in loads]
    assert read_recording(path)[0].counts == (6, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("[1]\n", "line 1: it is not an object with model"),
        ("{\n", "line 1: it is not JSON"),
        (json.dumps(load(0, 1, 2).to_json() | {"counts": [1]}), "line 1: it is not an object"),
        (json.dumps(load(0, 1, 2).to_json() | {"counts": [1, -2]}), "line 1: it is not an object"),
        ("\n".join(json.dumps(load(0, 1, 2, model=m).to_json()) for m in "ab"), "line 2: it is of 'b' with 2 experts"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "routing.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_recording(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_recording(tmp_path / "none")


def test_loads_of_other_layers_are_not_added() -> None:
    with pytest.raises(ConfigError, match="cannot be added"):
        load(0, 1, 2).plus(load(1, 1, 2))
    with pytest.raises(ConfigError, match="cannot be written"):
        write_recording("/nowhere/at/all", [])
