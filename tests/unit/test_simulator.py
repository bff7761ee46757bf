"""planner/simulator.py: real schedulers on a virtual clock lose nobody, starve nobody, and give the same every time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe.config.engine import SchedulerConfig
from flexmoe.planner.replica import EngineLimits, Replica
from flexmoe.planner.simulator import Fleet, Simulated, simulate
from flexmoe.planner.trace import TraceRequest
from flexmoe.planner.workload import Workload
from flexmoe.scheduling.step import Step


def seconds(step: Step) -> float:
    """1 ms a step and 0.1 ms a token."""
    return 1e-3 + 1e-4 * step.num_tokens


def limits(
    num_blocks: int = 500, seqs: int = 16, tokens: int = 256, data_ranks: int = 1, *, prefix: bool = False,
    ahead: bool = False,
) -> EngineLimits:  # fmt: skip
    scheduler = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    return EngineLimits(
        scheduler=scheduler, num_blocks=num_blocks, data_ranks=data_ranks, prefix_caching=prefix, ahead=ahead
    )


def fleet(replicas: int = 1, **options: int) -> Fleet:
    return Fleet(limits(**options), seconds, gpus_each=1, replicas=replicas, simulated=replicas)


def check_complete(done: Simulated, requests: list[TraceRequest]) -> None:
    assert len(done.served) == len(requests)
    for served in done.served:
        assert served.first is not None
        assert served.end is not None
        assert served.arrival < served.first <= served.end
    assert sum(done.line.tokens) == sum(served.output_len for served in done.served)


def test_one_request_takes_its_steps() -> None:
    done = simulate(fleet(), [TraceRequest(2.0, 100, 3)])
    (served,) = done.served
    assert served.ttft == pytest.approx(1e-3 + 100e-4)
    assert served.tpot == pytest.approx(1.1e-3)
    assert done.steps == 3
    assert done.end == pytest.approx(2.0 + 11e-3 + 2 * 1.1e-3)


def test_a_prompt_above_the_budget_takes_several_steps() -> None:
    (served,) = simulate(fleet(), [TraceRequest(0.0, 600, 1)]).served
    assert served.ttft == pytest.approx(3 * 1e-3 + 600e-4)
    assert served.tpot is None


def test_lengths_are_cut_to_the_cache() -> None:
    (served,) = simulate(fleet(num_blocks=4), [TraceRequest(0.0, 100, 50)]).served
    assert (served.input_len, served.output_len, served.cut) == (63, 1, 86)


@pytest.mark.parametrize(("data_ranks", "ahead"), [(1, False), (2, False), (1, True)])
def test_ten_thousand_requests_are_all_served_and_none_starves(data_ranks: int, ahead: bool) -> None:
    """At three times what one replica can do, with a cache so small that requests are thrown out."""
    requests = Workload(input_len=(1, 200), output_len=(1, 60), rate=300, num_requests=10_000).requests()
    done = simulate(fleet(replicas=3, num_blocks=60, data_ranks=data_ranks, ahead=ahead), requests)
    check_complete(done, requests)
    assert done.preemptions > 0
    # First come, first served at each replica: whoever waits has all the earlier ones before, and no later one. Over
    # three replicas and their data ranks, nobody is overtaken by more than what these differ in.
    starts = [served.first for served in done.served]
    latest = 0.0
    for served, first in zip(done.served, starts, strict=True):
        assert first is not None
        latest = max(latest, first)
        assert latest - first < 1.5, served


def test_who_comes_behind_a_step_that_was_launched_ahead_waits_for_it() -> None:
    """Steps of one decode take 1.1 ms. The second prompt comes in the third, behind which another is launched."""
    requests = [TraceRequest(0.0, 10, 20), TraceRequest(2e-3 + 2.5 * 1.1e-3, 10, 2)]
    ends = [2e-3 + 1.1e-3 * step for step in range(10)]
    for ahead, begin in ((False, ends[3]), (True, ends[4])):
        _, second = simulate(fleet(ahead=ahead), requests).served
        assert second.first == pytest.approx(begin + 1e-3 + 11e-4)


def test_one_replica_gives_first_tokens_in_order_of_arrival() -> None:
    requests = Workload(input_len=(1, 200), output_len=(1, 60), rate=100, num_requests=500).requests()
    firsts = [served.first for served in simulate(fleet(), requests).served]
    assert firsts == sorted(firsts)  # type: ignore[type-var]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 3), st.integers(8, 80), st.booleans())
def test_whatever_comes_all_blocks_are_free_at_the_end(
    seed: int, replicas: int, ranks: int, num_blocks: int, ahead: bool
) -> None:
    draw = random.Random(seed)
    requests = [
        TraceRequest(n * 0.01, draw.randint(1, 120), draw.randint(0, 40), (draw.randint(0, 2),) * draw.randint(0, 1))
        for n in range(60)
    ]
    made: list[Replica] = []
    original = Replica.__post_init__

    def remember(self: Replica) -> None:
        original(self)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replica, "__post_init__", remember)
        end = limits(num_blocks, data_ranks=ranks, prefix=True, ahead=ahead and ranks == 1)
        check_complete(simulate(Fleet(end, seconds, 1, replicas, replicas), requests), requests)
    assert len(made) == replicas
    for replica in made:
        replica.scheduler.check_integrity()
        assert replica.outstanding == 0
        assert replica.kv_used == 0


def test_the_same_again() -> None:
    requests = Workload(rate=50, num_requests=300).requests()
    first, second = (simulate(fleet(replicas=4), requests) for _ in range(2))
    assert [s.end for s in first.served] == [s.end for s in second.served]


def test_more_replicas_answer_sooner() -> None:
    requests = Workload(rate=20, num_requests=300).requests()
    one, four = (simulate(fleet(replicas=n), requests) for n in (1, 4))
    assert sum(s.ttft for s in four.served) < sum(s.ttft for s in one.served) / 2


@pytest.mark.parametrize("block", [7, 2**64 - 1])
def test_a_shared_prefix_is_computed_once(block: int) -> None:
    """Whatever a trace calls its blocks; some have hashes of them."""
    requests = [TraceRequest(0.0, 600, 2, (block,)), TraceRequest(10.0, 600, 2, (block,))]
    end = limits(num_blocks=200, tokens=2048, prefix=True)
    first, second = simulate(Fleet(end, seconds, 1, 1, 1), requests).served
    assert second.ttft == pytest.approx(first.ttft - 512e-4)
