"""Histograms, and what the engine writes into them."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

from flexmoe.config.routing import LayerLoad
from flexmoe.engine.metrics import EngineMetrics, ExpertMetrics, Histogram
from tests.cpu.serving import GREEDY, finish, open_llm


def test_a_value_on_a_bound_belongs_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.count == 6
    assert histogram.total == 16.5


def test_the_engine_s_bounds_rise() -> None:
    metrics = EngineMetrics()
    for histogram in (metrics.ttft, metrics.itl, metrics.tpot, metrics.e2e, metrics.queue):
        assert all(low < high for low, high in pairwise(histogram.bounds))


def test_an_engine_counts_tokens_ends_and_preemptions() -> None:
    """Four requests in a cache for two."""
    with open_llm("mixtral", num_blocks=6, enable_prefix_caching=False) as llm:
        engine = llm.engine
        for number in range(4):
            engine.add_request([5 + number] * 20, replace(GREEDY, max_tokens=30), request_id=str(number))
        for _ in range(10):
            engine.step()
        engine.abort("3")
        finish(engine)
        metrics = engine.metrics
        assert metrics.finished == {"length": 3, "abort": 1}
        assert metrics.preemptions > 0
        assert metrics.generated_tokens == metrics.itl.count + metrics.ttft.count
        assert metrics.e2e.count == 4
        assert metrics.queue.count == metrics.ttft.count >= 3
        assert metrics.prompt_tokens == 20 * metrics.queue.count
        assert metrics.tpot.count >= 3
        assert metrics.steps >= 30


def test_loads_of_experts_add_up_by_layer() -> None:
    experts = ExpertMetrics()
    first = LayerLoad("m", 1, 2, (3, 1, 0, 0), 1, 2, (1, 1, 0, 0))
    second = LayerLoad("m", 1, 2, (0, 0, 0, 4), 2, 2, (0, 0, 0, 2))
    unseen = LayerLoad("m", 2, 2, (0, 0, 0, 0), 0, 0, (0, 0, 0, 0))
    experts.add([first])
    experts.add([second, unseen])
    assert experts.loads == {1: first.plus(second)}
    assert experts.latest == {1: second}
    assert experts.imbalance(1) == 2.0


def test_whoever_reads_between_two_lines_finds_a_sum_for_every_look() -> None:
    """The event loop's thread does, for the web page."""
    experts, looks = ExpertMetrics(), list[int]()

    def read(*_: Any) -> Any:
        assert experts.latest.keys() <= experts.loads.keys()
        assert (experts.looks > 0) <= bool(experts.latest)
        looks.append(experts.looks)
        return read

    sys.settrace(read)
    try:
        experts.add([LayerLoad("m", 1, 2, (3, 1, 0, 0), 1, 2, (1, 1, 0, 0))])
    finally:
        sys.settrace(None)
    assert len(looks) > 3
    assert looks[-1] == 1
