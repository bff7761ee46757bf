"""engine/collector.py: what lives at the start is left out, and in ranks looked through once more at the end."""

from __future__ import annotations

import gc
import socket
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from flexmoe.config.engine import EngineConfig
from flexmoe.config.server import ServerConfig
from flexmoe.engine import worker
from flexmoe.engine.collector import leave_out, take_in
from flexmoe.parallel.rank import Setup


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_left_out_is_collected_once_it_is_taken_in() -> None:
    old = Cycle()
    gone, kept = weakref.ref(Cycle()), weakref.ref(old)
    leave_out()
    assert gone() is None, "what was garbage at the start is not kept"
    del old
    young = weakref.ref(Cycle())
    gc.collect()
    assert young() is None
    assert kept() is not None
    take_in()
    assert kept() is None


def test_a_server_leaves_out_what_it_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn")
    from flexmoe.server import run

    seen: list[int] = []

    class Server:
        died = hung = left = False

        def __init__(self, *_: Any) -> None:
            assert gc.get_freeze_count() == 0

        def run(self, sockets: list[socket.socket]) -> None:
            seen.append(gc.get_freeze_count())

    monkeypatch.setattr(run, "make_engine", lambda options: object())
    monkeypatch.setattr(run, "_start_log", lambda: None)
    monkeypatch.setattr(run.sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setattr(run, "Server", Server)
    assert run.serve({}, ServerConfig(port=0), lambda service, url: None) == 0
    assert len(seen) == 1
    assert seen[0] > 10_000


def test_a_rank_with_a_process_of_its_own_does_until_it_lets_go_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    report, options = object(), EngineConfig()
    monkeypatch.setattr(worker.Worker, "start", lambda *_: report)
    rank = worker.ChildWorker(Setup(0, 1, 0, 1, "localhost", 0, 1.0), [0, 0])
    assert rank.start(options) is report
    assert gc.get_freeze_count() > 10_000
    rank.stop()
    assert gc.get_freeze_count() == 0
