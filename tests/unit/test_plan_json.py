"""ParallelPlan: degrees that go together, placements of layers, and JSON that gives the same plan back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.errors import ConfigError, UnknownOptionError


@st.composite
def placements(draw: st.DrawFn, ranks: int) -> ExpertPlacement:
    """Uneven, with replicas and empty ranks."""
    num_experts = draw(st.integers(1, 9))
    slots: list[list[int]] = [[] for _ in range(ranks)]
    for expert in [*range(num_experts), *draw(st.lists(st.integers(0, num_experts - 1), max_size=6))]:
        slots[draw(st.integers(0, ranks - 1))].append(expert)
    return ExpertPlacement(num_experts, tuple(map(tuple, slots)))


@st.composite
def plans(draw: st.DrawFn) -> ParallelPlan:
    tp, dp, pp = (draw(st.integers(1, 4)) for _ in range(3))
    ep = draw(st.sampled_from([d for d in range(1, tp * dp + 1) if tp * dp % d == 0]))
    layers = draw(st.lists(st.one_of(st.none(), st.integers(0, 5)), unique=True, max_size=4))
    found: dict[int | None, ExpertPlacement] = {layer: draw(placements(ep)) for layer in layers}
    return ParallelPlan(tp, ep, pp, dp, draw(st.sampled_from(["auto", "all_reduce", "all_to_all"])), found)


@given(plans())
def test_json_gives_the_same_plan_back(plan: ParallelPlan) -> None:
    assert ParallelPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    entries = [{"layers": None, "num_experts": 3, "slots": [[0, 1], [2, 0]]}]
    entries += [{"layers": [1, 4], "num_experts": 3, "slots": [[2], [0, 1]]}]
    path.write_text(json.dumps({"tensor_parallel_size": 2, "expert_parallel_size": 2, "placements": entries}))
    plan = ParallelPlan.read(path)
    assert plan.num_ranks == plan.stage_size == 2
    assert plan.placement(3, 0).slots == ((0, 1), (2, 0))
    assert plan.placement(3, 4).slots == plan.placement(3, 1).slots == ((2,), (0, 1))
    plan.write(path)
    assert ParallelPlan.read(path) == plan


def test_replicas_are_found_on_every_rank() -> None:
    placement = ExpertPlacement(3, ((0, 1, 0), (2, 0)))
    assert placement.replicas(0) == ((0, 0), (0, 2), (1, 1))
    assert placement.replicas(2) == ((1, 0),)


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as error:
        ParallelPlan(**fields)
    return str(error.value)


def test_degrees_must_go_together() -> None:
    assert refusal(tensor_parallel_size=4, expert_parallel_size=3).endswith(
        "does not divide the 4 ranks (data_parallel_size x tensor_parallel_size) that share the experts; "
        "use 1, 2 or 4, or more ranks (tensor_parallel_size=3)."
    )
    assert "use 1, or more ranks (tensor_parallel_size=2)" in refusal(expert_parallel_size=2)
    assert refusal(moe_dispatch="magic") == "moe_dispatch='magic' is not one of auto, all_reduce, all_to_all."
    assert ParallelPlan(2, 4, data_parallel_size=2).expert_tensor_size == 1


def test_a_placement_is_for_the_plans_ranks() -> None:
    said = refusal(tensor_parallel_size=2, placements={3: ExpertPlacement.contiguous(4, 2)})
    assert said == "the placement of layer 3 is for 2 ranks, but expert_parallel_size=1; make them equal."


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "a JSON object, not list"),
        ({"placements": 3}, "placements of a plan is not a list"),
        ({"placements": [{"layers": [0], "slots": [[0]]}]}, "placements of a plan is not a list"),
        ({"placements": [{"layers": ["a"], "num_experts": 1, "slots": [[0]]}]}, "placements of a plan is not a list"),
        ({"placements": [{"layers": None, "num_experts": 2, "slots": [[0]]}]}, "missing [1], unknown []"),
    ],
)
def test_malformed_plans_are_refused(data: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelPlan.from_json(data)
    assert words in str(error.value)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UnknownOptionError, match="did you mean 'placements'"):
        ParallelPlan.from_json({"placement": []})


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        ParallelPlan.read(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="is refused: it is not JSON"):
        ParallelPlan.read(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"tensor_parallel_size": 0}')
    with pytest.raises(ConfigError, match="is refused: tensor_parallel_size=0 is not a positive integer"):
        ParallelPlan.read(tmp_path / "plan.json")
