"""What a server adds: config/serving.py, and its part in simulations, estimates and what commands say. No torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flexmoe.cli.main import main
from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.serving import Serving
from flexmoe.errors import ConfigError
from flexmoe.planner.replica import EngineLimits, Served
from flexmoe.planner.simulator import Fleet, simulate
from flexmoe.planner.trace import TraceRequest
from flexmoe.scheduling.step import Step
from tests.unit.planning import machine, question, setting

SERVING = Serving(2e-3, 1e-6, ((1, 1e-4), (4, 4e-4), (8, 6e-4)))


def seconds(step: Step) -> float:
    """1 ms a step and 0.1 ms a token."""
    return 1e-3 + 1e-4 * step.num_tokens


def served(
    requests: list[TraceRequest], serving: Serving | None, chunk_rate: float = 1e9, *, beside: bool = False
) -> list[Served]:
    scheduler = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256)
    limits = EngineLimits(scheduler=scheduler, num_blocks=500, serving=serving, chunk_rate=chunk_rate, beside=beside)
    return simulate(Fleet(limits, seconds, 1, 1, 1), requests).served


@pytest.mark.parametrize(
    ("streams", "us"), [(0, 0), (0.5, 50), (1, 100), (2, 200), (4, 400), (6, 500), (8, 600), (12, 800)]
)
def test_steps_are_longer_by_the_streams_that_get_a_token(streams: float, us: float) -> None:
    assert SERVING.step(streams) == pytest.approx(us * 1e-6)


def test_a_step_is_never_shorter_for_its_streams() -> None:
    falling = Serving(0.0, 0.0, ((1, 2e-4), (4, 1e-4)))
    assert falling.step(40) == 0
    assert Serving(1.0).step(9) == 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the machine's serving is a JSON object, not list"),
        ({"request_us": 1}, "'streams_us' is missing"),
        ({"request_us": 1, "streams_us": 3}, "streams_us=3 is not a list"),
        ({"request_us": -1, "streams_us": []}, "request_us=-1 is not a number from 0"),
        ({"request_us": 1, "streams_us": [[1, "x"]]}, r"\[1, 'x'\] is no cost of streams"),
        ({"request_us": 1, "streams_us": [[4, 1], [1, 2]]}, r"streams \[4, 1\]; use ascending ones"),
        ({"request_us": 1, "streams_us": [], "requests_us": 2}, "requests_us"),
    ],
)
def test_a_wrong_entry_is_one_clear_line(data: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Serving.from_json(data)


def test_a_simulated_request_waits_for_the_server_and_its_tokens_make_steps_longer() -> None:
    asked = [TraceRequest(1.0, 100, 5)]
    (alone,), (one,) = served(asked, None), served(asked, SERVING)
    assert one.arrival == 1.0
    assert one.ttft - alone.ttft == pytest.approx(2e-3 + 100e-6)
    assert one.tpot is not None
    assert alone.tpot is not None
    assert one.tpot - alone.tpot == pytest.approx(1e-4)


@pytest.mark.parametrize(("sending_ms", "longer_ms"), [(0.1, 0.0), (1.5, 0.4)])
def test_beside_a_gpu_only_sending_that_outlasts_the_step_counts(sending_ms: float, longer_ms: float) -> None:
    """A step of one stream takes 1.1 ms."""
    serving, asked = Serving(2e-3, 0.0, ((1, sending_ms * 1e-3),)), [TraceRequest(0.0, 100, 5)]
    (alone,), (one,) = served(asked, None), served(asked, serving, beside=True)
    assert one.tpot is not None
    assert alone.tpot is not None
    assert one.tpot - alone.tpot == pytest.approx(longer_ms * 1e-3)
    assert one.ttft - alone.ttft == pytest.approx(2e-3)


def test_a_server_that_lets_few_pieces_cross_makes_few_steps_longer() -> None:
    """One stream's steps take 1.1 ms, so at 250 pieces a second every fourth is sent."""
    (one,), (alone,) = (served([TraceRequest(0.0, 10, 41)], serving, 250.0) for serving in (SERVING, None))
    assert one.tpot is not None
    assert alone.tpot is not None
    assert one.tpot - alone.tpot == pytest.approx(1e-4 / 4, rel=0.1)


def test_longer_prompts_are_longer_on_their_way_and_all_stay_in_their_order() -> None:
    slow = Serving(0.0, 1e-3)
    first, second = served([TraceRequest(0.0, 200, 2), TraceRequest(0.1, 10, 2)], slow)
    assert (first.input_len, second.input_len) == (200, 10)
    assert first.first is not None
    assert second.first is not None
    assert second.first < 0.2 < first.first


def test_an_estimate_has_it_in_times_and_not_in_throughput() -> None:
    asked = setting("olmoe-1b-7b", 1)
    alone = asked.search(question(asked)).best
    slow = Serving(2e-3, 1e-6, ((1, 1.1 * alone.tpot), (512, 1.1 * alone.tpot)))
    with_server = replace(asked, machine=replace(asked.machine, serving=slow))
    found = with_server.search(question(with_server)).best
    assert found.first["serving"] == pytest.approx(2e-3 + 512e-6)
    assert found.ttft - alone.ttft == pytest.approx(2e-3 + 512e-6, rel=0.2)
    others = sum(found.token.values()) - found.token["serving"]
    assert 0 < found.token["serving"] == pytest.approx(slow.step(found.batch) - others), "the GPU computes meanwhile"
    assert sum(found.token.values()) == pytest.approx(found.tpot)
    assert "serving" not in alone.token
    assert "serving" not in found.work
    assert found.throughput == pytest.approx(alone.throughput)


def test_commands_say_whose_times_they_tell(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    machine(1).save(old)
    replace(machine(1), serving=SERVING).save(new)
    for words in (("plan",), ("simulate", "--num-requests", "5")):
        told = [
            CliRunner().invoke(main, [words[0], "olmoe-1b-7b", *words[1:], "--machine", str(f)]) for f in (old, new)
        ]
        assert "TTFT and TPOT are of the engine alone: what an HTTP server adds was not measured" in told[0].stderr
        assert "TTFT and TPOT hold what an HTTP server adds." in told[1].stderr
    rows = [
        json.loads(CliRunner().invoke(main, ["plan", "olmoe-1b-7b", "--machine", str(file), "--json"]).stdout)
        for file in (old, new)
    ]
    assert [row["serving"] for row in rows] == [False, True]
