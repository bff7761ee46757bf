"""bench/machine_serving.py: what a server adds is measured against servers that add what is known, and our own."""

from __future__ import annotations

import asyncio

import pytest

from flexmoe.bench import machine_serving
from flexmoe.bench.machine_serving import ask, measure_serving
from flexmoe.bench.own_server import own_server
from flexmoe.bench.subject import open_subject
from flexmoe.errors import EngineError
from tests.openai_server import FakeServer

pytestmark = pytest.mark.usefixtures("few_rounds")


def test_what_a_server_takes_beside_its_engine_is_found() -> None:
    """20 ms before each piece, of which the engine needs 5."""
    with FakeServer(gap=0.02, engine_gap=0.005) as server:
        found = asyncio.run(ask(server.url, 0.1))
        asked = server.requests
    assert 0.015 <= found.request(16) < 0.1
    assert [count for count, _ in found.streams] == [1, 4]
    assert all(0.01 <= seconds < 0.1 for _, seconds in found.streams)
    prompts = [tuple(request["prompt"]) for request in asked]
    assert len(set(prompts)) == len(prompts), "none is in a cache"
    assert {request["stream"] for request in asked} == {True, False}


def test_our_own_server_tells_its_engine_s_part() -> None:
    with open_subject(None) as subject, own_server(subject, ["--device", "cpu", "--threads", "1"]) as url:
        found = asyncio.run(ask(url, 0.1))
    assert 0 < found.request_s < 1
    assert all(seconds < 1 for _, seconds in found.streams)


def test_a_server_that_cannot_be_measured_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(machine_serving, "why_not", lambda _: "serving needs more packages")
    assert measure_serving("cpu", 1, said.append) is None
    assert said[-1] == "what a server adds is left out: serving needs more packages"

    def dead(*_: object) -> None:
        raise EngineError("the server did not start: it said nothing.")

    monkeypatch.setattr(machine_serving, "why_not", lambda _: None)
    monkeypatch.setattr(machine_serving, "own_server", dead)
    assert measure_serving("cpu", 1, said.append) is None
    assert said[-1] == "what a server adds is left out: the server did not start: it said nothing."
