"""The background server over a stand-in for the engine: order, errors, interruption, closing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import EngineError
from flexmoe.serve.server import Server

PARAMS = SamplingParams(max_tokens=1)


@dataclass
class Output:
    token_ids: tuple[int, ...]
    finished: bool


LONG = 10**9  # tokens of an answer that goes on until it is enough


class Engine:
    """Yields one more token a turn until a prompt's first number is reached; notes what was closed early."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.given_up: list[int] = []
        self.closed = 0
        self.enough = False
        self.gate = threading.Event()
        self.gate.set()

    def stream(self, ids: Sequence[int], params: SamplingParams) -> Iterator[Output]:
        finished = False
        try:
            for n in range(1, ids[0] + 1):
                if ids[0] == 13:
                    raise ValueError("thirteen")
                assert self.gate.wait(60)
                self.order.append(ids[0])
                finished = n == ids[0] or self.enough
                yield Output(tuple(range(n)), finished)
                if finished:
                    return
        finally:
            if not finished:
                self.given_up.append(ids[0])

    def close(self) -> None:
        self.closed += 1


def serve() -> tuple[Any, Server]:
    engine: Any = Engine()
    return engine, Server(engine)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_outputs_come_in_the_order_of_the_prompts() -> None:
    _, server = serve()
    outputs = server.run([[5], [1], [3]], [PARAMS] * 3)
    assert [len(output.token_ids) for output in outputs] == [5, 1, 3]
    assert server.run([], []) == []


def test_a_short_request_joins_a_long_one_and_overtakes_it() -> None:
    engine, server = serve()
    done: list[int] = []

    def ask(length: int) -> None:
        server.run([[length]], [PARAMS])
        done.append(length)

    long = threading.Thread(target=ask, args=(LONG,))
    long.start()
    wait_for(lambda: len(engine.order) > 10)
    ask(2)
    assert done == [2]
    engine.enough = True
    long.join(60)
    assert done == [2, LONG]


def test_an_error_reaches_its_own_caller_alone() -> None:
    _, server = serve()
    with pytest.raises(ValueError, match="thirteen"):
        server.run([[4], [13]], [PARAMS] * 2)
    assert len(server.run([[4]], [PARAMS])[0].token_ids) == 4


def test_an_interrupted_caller_gives_its_requests_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, server = serve()

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        wait_for(lambda: len(engine.order) > 3)
        raise KeyboardInterrupt

    server.start_server()  # before Event.wait is changed: starting a thread waits for one, too
    with monkeypatch.context() as patched:
        patched.setattr("flexmoe.serve.server.threading.Event.wait", interrupted)
        engine.gate.wait = lambda timeout: True  # the engine's own event is not interrupted
        with pytest.raises(KeyboardInterrupt):
            server.run([[LONG]], [PARAMS])
    server.stop_server()  # which would wait for it
    assert engine.given_up == [LONG]


def test_what_was_asked_before_is_answered_when_the_server_stops() -> None:
    engine, server = serve()
    engine.gate.clear()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.extend(server.run([[50]], [PARAMS])))
    asking.start()
    wait_for(lambda: server.serving)
    stopping = threading.Thread(target=server.stop_server)
    stopping.start()
    engine.gate.set()
    stopping.join(60)
    asking.join(60)
    assert len(answers[0].token_ids) == 50
    assert not server.serving
    assert len(server.run([[2]], [PARAMS])) == 1  # it starts by itself again


def test_a_closed_server_stays_closed() -> None:
    engine, server = serve()
    server.run([[2]], [PARAMS])
    server.close()
    server.close()
    assert engine.closed >= 1
    with pytest.raises(EngineError, match="closed"):
        server.run([[2]], [PARAMS])


def test_a_server_that_its_owner_forgot_is_freed() -> None:
    """What `flexmoe.serve.LLM` does: the thread holds the engine, so only a finalizer can end it."""

    class Owner:
        pass

    engine, server = serve()
    server.run([[2]], [PARAMS])
    owner = Owner()
    weakref.finalize(owner, server.close)
    del owner
    gc.collect()
    assert engine.closed == 1
    assert not server.serving
