"""A keeper and what stands for its process, without Ray: strangers are turned away, and who loses the other ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import psutil
import pytest

from flexmoe.parallel.beats import LIFE
from flexmoe.parallel.keeper import Keeper, KeptBeats, KeptProcess, Order, Place
from flexmoe.parallel.rank import Setup
from tests.multi.test_supervisor import LIMIT, all_end

KEY = b"0123456789abcdef"
ORDER = Order("tests.multi.worker", 1, 2, {"FLEXMOE_TEST_WORD": "told"})


class Kept:
    """A keeper in a thread, and the process that it started for this one."""

    def __init__(self) -> None:
        keeper = Keeper()
        self.place = keeper.listen("127.0.0.1", KEY)
        self.thread = threading.Thread(target=keeper.run)
        self.thread.start()
        strangers(self.place)
        self.process = KeptProcess(self.place, KEY, ORDER)
        self.process.connection.send(Setup(1, 2, 0, 1, "127.0.0.1", 1, 5.0))

    def is_over(self) -> bool:
        self.thread.join(LIMIT)
        return not self.thread.is_alive() and all_end([self.process.pid])


def strangers(place: Place) -> None:
    """Others that find the port: one that says nothing, and one with a key of its own."""
    socket.create_connection((place.host, place.port)).close()
    with pytest.raises(AuthenticationError):
        Client((place.host, place.port), authkey=b"another")


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.process.kill()
    made.process.close()
    made.process.connection.close()
    made.thread.join(LIMIT)


def test_a_rank_is_reported_while_it_lives_and_when_it_dies(kept: Kept) -> None:
    process = kept.process
    assert psutil.Process(process.pid).environ().items() >= ORDER.environment.items()
    deadline = time.monotonic() + 60
    while not process.beats[LIFE]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert KeptBeats([process]).read(LIFE) == [process.beats[LIFE]]
    assert (process.ended(), process.code) == (False, None)
    Path(f"/proc/{process.pid}/fd/1").write_text("last words")
    os.kill(process.pid, signal.SIGTERM)
    assert process.ended(LIMIT)
    assert (process.code, process.tail()) == (-signal.SIGTERM, b"last words")
    assert kept.is_over()


def test_a_rank_is_killed_on_demand(kept: Kept) -> None:
    kept.process.kill()
    assert (kept.process.ended(), kept.process.code) == (True, -signal.SIGKILL)
    assert kept.is_over()
    kept.process.kill()  # once more does no harm


def test_a_keeper_ends_without_its_driver(kept: Kept) -> None:
    kept.process.close()
    assert kept.process.ended(LIMIT)
    assert kept.process.code is None
    assert kept.is_over()
