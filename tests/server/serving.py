"""Servers for tests: one in a thread of this process, or `flexmoe serve` as a process; and a look at what they hold."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx

from flexmoe.config.server import ServerConfig
from flexmoe.engine.engine import Engine
from flexmoe.planned import make_engine
from flexmoe.server.run import Server, listening
from flexmoe.server.service import Service

ENGINE: dict[str, Any] = {"num_blocks": 192, "max_num_seqs": 8, "threads": 1}
PATIENCE = 60.0  # seconds; the machine may be busy
STEP_SECONDS = 0.05  # of an engine that is slowed


@dataclass(frozen=True)
class Running:
    """A server in this process."""

    url: str
    service: Service
    server: Server

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    @property
    def engine(self) -> Engine:
        return self.service.engine.engine

    @property
    def api(self) -> str:
        return self.url + "/v1"

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE, **options)

    def connect(self) -> socket.socket:
        """A bare connection, for clients that misbehave."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def assert_idle(self) -> None:
        """Within a moment nothing runs, nothing is queued, every block is free."""
        blocks = self.engine.scheduler.blocks
        wait_for(lambda: self.service.engine.num_streams == 0 and not self.engine.has_unfinished)
        assert blocks.num_free == blocks.num_blocks
        self.engine.scheduler.check_integrity()


@contextlib.contextmanager
def running(engine: dict[str, Any] | None = None, **config: Any) -> Iterator[Running]:
    """The built-in model, served from a thread."""
    options = ServerConfig(port=0, **{"receive_seconds": 2.0, "drain_seconds": 1.0, "max_waiting": 24, **config})
    found: list[tuple[Service, str]] = []
    ready = threading.Event()

    def announce(service: Service, url: str) -> None:
        found.append((service, url))
        ready.set()

    with listening(options) as listener:
        server = Server(make_engine({**ENGINE, **(engine or {})}), options, listener, announce)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(PATIENCE)
            service, url = found[0]
            yield Running(url, service, server)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
    assert not thread.is_alive()


class Process:
    """`flexmoe serve` in a process of its own, on a free port."""

    def __init__(self, *arguments: str, program: Sequence[str] = ("-m", "flexmoe")) -> None:
        command = [sys.executable, *program, "serve", "--port", "0", "--threads", "1", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
        self.lines: list[str] = []
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        wait_for(lambda: self.url or self.process.poll() is not None)
        assert self.url, "\n".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith("Serving at "):
                self.url = line.split()[2]
        self.process.stderr.close()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status."""
        return self.process.wait(seconds)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def process(*arguments: str, program: Sequence[str] = ("-m", "flexmoe")) -> Iterator[Process]:
    """A server that is gone afterwards."""
    server = Process(*arguments, program=program)
    try:
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def slowed(engine: Engine) -> Iterator[None]:
    """Within, a step takes so long that no answer of some hundred tokens ends while a test asks its next questions."""
    with unittest.mock.patch.object(engine, "step", functools.partial(slow_step, engine.step)):
        yield


def slow_step(step: Callable[..., Any], **options: Any) -> Any:
    time.sleep(STEP_SECONDS)
    return step(**options)


# `flexmoe serve` with such steps until there is the file {hurry}.
SLOWED = """
import sys, time
from pathlib import Path
from flexmoe.cli.main import main
from flexmoe.engine.engine import Engine
step, hurry = Engine.step, Path({hurry!r})
def slow(*arguments, **options):
    if not hurry.exists():
        time.sleep({seconds})
    return step(*arguments, **options)
Engine.step = slow
sys.argv[0] = "flexmoe"
main()
"""


def slowed_process(hurry: Path, *arguments: str) -> contextlib.AbstractContextManager[Process]:
    """A server whose steps are slow until the file is there."""
    return process(*arguments, program=("-c", SLOWED.format(hurry=str(hurry), seconds=STEP_SECONDS)))


def wait_for(condition: Any, seconds: float = PATIENCE) -> None:
    """Until it is true. AssertionError if it never is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds:g} s"
        time.sleep(0.01)
