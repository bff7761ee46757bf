"""planner/space.py, estimate.py, search.py, planning.py: all candidates, in a fixed order, with reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe.config.plan import ParallelPlan
from flexmoe.config.routing import LayerLoad
from flexmoe.errors import ConfigError
from flexmoe.models.presets import PRESETS
from flexmoe.planner.space import Candidate, Space, candidates
from flexmoe.planner.workload import Workload
from tests.unit.planning import SLOW, machine, olmoe, question, setting

MIXTRAL = PRESETS["mixtral-8x7b"].config


def test_every_candidate_uses_all_gpus_and_none_comes_twice() -> None:
    for gpus in (1, 2, 6, 8, 16):
        found = candidates(MIXTRAL, Space(gpus=gpus, node=8))
        assert all(one.replicas * one.plan.num_ranks == gpus for one in found)
        assert len({(one.plan.to_json()["moe_dispatch"], one.name) for one in found}) == len(found)
        assert [one.order for one in found] == sorted(one.order for one in found)


def test_two_gpus_have_eight_candidates() -> None:
    names = {candidate.name for candidate in candidates(MIXTRAL, Space(gpus=2, node=8))}
    assert names == {
        "2 engines x one rank", "pipeline 2", "tensor 2, experts sliced", "tensor 2, experts over 2",
        "tensor 2, experts over 2, all-to-all", "data 2, experts sliced", "data 2, experts over 2",
        "data 2, experts over 2, all-to-all",
    }  # fmt: skip


def test_a_tensor_group_stays_on_its_node() -> None:
    found = candidates(MIXTRAL, Space(gpus=16, node=4))
    assert max(candidate.plan.tensor_parallel_size for candidate in found) == 4


def test_one_engine_has_no_replicas_and_may_leave_gpus_idle() -> None:
    found = candidates(MIXTRAL, Space(gpus=4, node=8, one_engine=True))
    assert all(candidate.replicas == 1 for candidate in found)
    assert {candidate.plan.num_ranks + candidate.idle for candidate in found} == {4}
    assert "one rank (3 idle)" in {candidate.name for candidate in found}


def test_only_data_parallel_has_neither_slices_nor_stages() -> None:
    found = candidates(MIXTRAL, Space(gpus=4, node=8, one_engine=True, only_data_parallel=True))
    assert found
    assert {(c.plan.tensor_parallel_size, c.plan.pipeline_parallel_size, c.plan.data_parallel_size) for c in found} == {
        (1, 1, 4)
    }


def test_the_best_is_first_and_every_other_has_a_reason() -> None:
    asked = setting()
    for objective in ("throughput", "tpot", "ttft"):
        found = asked.search(question(asked, objective))
        assert found.ranking[0].reason == ""
        assert all(ranked.reason for ranked in found.ranking[1:])
        assert not found.best.refused
        able = [ranked.estimate for ranked in found.ranking if not ranked.estimate.refused]
        figures = [{"throughput": 1 / e.throughput, "tpot": e.tpot, "ttft": e.ttft}[objective] for e in able]
        met = [not e.missed or objective == "throughput" for e in able]
        assert [f for f, ok in zip(figures, met, strict=True) if ok] == sorted(
            f for f, ok in zip(figures, met, strict=True) if ok
        )


def test_terms_add_up_to_the_figures() -> None:
    asked = setting()
    best = asked.search(question(asked)).best
    assert sum(best.first.values()) == pytest.approx(best.ttft)
    assert sum(best.token.values()) == pytest.approx(best.tpot)
    assert 1 / sum(best.work.values()) == pytest.approx(best.throughput)


def test_the_same_question_has_the_same_answer() -> None:
    asked = setting("olmoe-1b-7b", 4)
    first, second = (asked.search(question(asked)) for _ in range(2))
    assert [(r.estimate.candidate.name, r.reason) for r in first.ranking] == [
        (r.estimate.candidate.name, r.reason) for r in second.ranking
    ]


def test_what_does_not_fit_is_refused_with_its_bytes() -> None:
    """Mixtral has 87 GiB of weights in bf16."""
    asked = setting(gpus=2)
    found = asked.search(question(asked))
    refused = {r.estimate.candidate.name: r.reason for r in found.ranking if r.estimate.refused}
    assert set(refused) == {"2 engines x one rank"}
    assert "needs" in refused["2 engines x one rank"]
    assert "weights in bfloat16 86.99 GiB" in refused["2 engines x one rank"]


def test_an_impossible_memory_is_one_clear_line() -> None:
    asked = setting(gpus=2, memory_gib=24)
    with pytest.raises(ConfigError, match=r"^no plan fits; the nearest is .*: rank \d needs .* has 24\.00 GiB\.$"):
        asked.search(question(asked))


def test_a_budget_bounds_what_is_costed() -> None:
    asked = setting("olmoe-1b-7b", 4)
    found = asked.search(question(asked, budget=5))
    assert len(found.ranking) == 5
    assert found.skipped == len(candidates(olmoe(), asked.space())) - 5


def test_a_slow_link_prefers_what_sends_less() -> None:
    """Over a fast link slices answer soonest; over a slow one engines of their own give the most."""
    fast, slow = setting("olmoe-1b-7b"), setting("olmoe-1b-7b", link=replace(SLOW, size=8, bandwidth=2e9))
    assert slow.search(question(slow)).best.candidate.name == "8 engines x one rank"
    name = fast.search(question(fast, "ttft")).best.candidate.name
    assert "engines" not in name, name


def test_a_promise_bounds_the_batch() -> None:
    asked = setting("olmoe-1b-7b", 1)
    free = asked.search(question(asked)).best
    bound = asked.search(question(asked, slo_tpot_ms=free.tpot * 1e3 * 1.5)).best
    assert bound.most < free.most
    assert bound.limit == "promised times"
    assert bound.throughput < free.throughput


def test_a_rate_that_nobody_reaches_is_said() -> None:
    asked = setting("olmoe-1b-7b", 1)
    (only,) = asked.search(question(asked, "tpot", rate=1e6)).ranking
    assert only.estimate.missed.endswith("requests/s, asked are 1e+06")


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6))
def test_more_requests_never_shorten_times(rate: int, times: int) -> None:
    asked = setting("olmoe-1b-7b", 1)
    calm, busy = (asked.search(question(asked, "tpot", rate=r)).best for r in (rate, rate * times))
    assert busy.batch >= calm.batch
    assert busy.tpot >= calm.tpot


def test_recorded_routing_places_the_experts() -> None:
    counts = tuple(1000 if expert < 4 else 10 for expert in range(64))
    loads = tuple(LayerLoad("olmoe", layer, 8, counts, 10, 600, (10,) * 64) for layer in range(16))
    asked = replace(setting("olmoe-1b-7b", 4), loads=loads)
    found = asked.search(question(asked, one_engine=True))
    spread = [r.estimate.candidate.plan for r in found.ranking if r.estimate.candidate.plan.expert_parallel_size == 4]
    assert spread
    for plan in spread:
        hot = [sum(expert < 4 for expert in rank) for rank in plan.placement(64, 0).slots]
        assert min(hot) >= 1, plan  # one hot expert on each rank, at least
    plain = Candidate(ParallelPlan(4, 4))
    _, steps = asked._placed(plain, question(asked).limits)
    assert sum(steps.prompt(2048).values()) < sum(asked.steps(plain.plan, question(asked).limits).prompt(2048).values())


def test_more_nodes_need_a_link_between_them() -> None:
    alone = replace(machine(), links=machine().links[:1])
    with pytest.raises(ConfigError, match="64 devices of test are 8 nodes, but its links reach 8;"):
        replace(setting(), machine=alone).resized(64)


def test_a_plan_of_a_file_is_repeated_or_refused(tmp_path: object) -> None:
    path = f"{tmp_path}/plan.json"
    ParallelPlan(2, 2).write(path)
    asked = setting()
    limits = question(asked).limits
    assert asked.candidate(path, Workload(), limits).replicas == 4
    with pytest.raises(ConfigError, match="needs 2 devices, of which 3 are no multiple"):
        asked.resized(3).candidate(path, Workload(), limits)


def test_a_simulation_of_a_plan_that_does_not_fit_is_refused() -> None:
    asked = setting(gpus=1)
    with pytest.raises(ConfigError, match="one rank cannot run: rank 0 needs"):
        asked.simulate(Candidate(ParallelPlan()), Workload(), question(asked).limits, exact_tokens=1000)


def test_a_simulation_and_its_estimate_agree() -> None:
    """The same step times; the queue by formula on one side, by events on the other."""
    asked = setting("olmoe-1b-7b", 1)
    wanted = Workload(rate=20.0, duration=120)
    best = asked.search(question(asked, "tpot", rate=20.0)).best
    done = asked.simulate(best.candidate, wanted, question(asked).limits, exact_tokens=10**7)
    assert done.kind == "extrapolation"
    assert done.tpot_ms["mean"] == pytest.approx(1e3 * best.tpot, rel=0.2)
    assert done.ttft_ms["mean"] == pytest.approx(1e3 * best.ttft, rel=0.3)


def test_some_replicas_stand_for_all() -> None:
    asked = setting("olmoe-1b-7b", 8)
    wanted = Workload(rate=80.0, duration=20)
    eight = Candidate(ParallelPlan(), 8)
    limits = question(asked).limits
    whole, part = (asked.simulate(eight, wanted, limits, exact_tokens=n) for n in (10**7, 70_000))
    assert (whole.simulated, part.simulated) == (8, 2)
    assert part.rate == pytest.approx(whole.rate, rel=0.1)
    assert part.output_tokens_per_s == pytest.approx(whole.output_tokens_per_s, rel=0.1)
    assert part.tpot_ms["p50"] == pytest.approx(whole.tpot_ms["p50"], rel=0.15)
