"""One rank's side of a launch: take commands from the driver, answer, and end with it.

Enters: (number, command, payload) over a connection. Leaves: (number, verdict, answer), where the verdict is "done",
"refused" (an error on purpose: the rank goes on) or "died" (anything else: its process ends).

Commands come over a connection of the rank's own and not by a collective, so that an idle rank waits without a timeout
and without spinning, and the driver's process never waits in a collective that a dead peer will not join.

What a device computes may be answered `Later`: the rank takes the next command meanwhile, which can be queued behind
it. Answers go in the order of the commands.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from flexmoe.errors import FlexMoEError
from flexmoe.parallel.beats import LIFE, Beats

SILENT = object()  # an answer that is not sent
_PULSE_SECONDS = 0.5
_PR_SET_TIMERSLACK = 29  # of prctl(2); in nanoseconds, of the calling thread
_GLANCE_SECONDS = 20e-6  # between looks at what is not ready yet; a step takes a hundred times as long


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that is on its way. ready: whether `result` need not wait."""

    ready: Callable[[], bool]
    result: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rank is told first. host and port: of the store where the ranks meet.

    local_rank, machine_size: which of the ranks on its machine it is, and how many those are.
    timeout: seconds that a collective may take.
    """

    rank: int
    size: int
    local_rank: int
    machine_size: int
    host: str
    port: int
    timeout: float


class Handler(Protocol):
    """What a rank does with commands."""

    def handle(self, command: str, payload: Any) -> Any:
        """Carry out one command. Returns the answer, or SILENT, or Later."""

    def close(self) -> None:
        """No more commands will come."""


def main(make: Callable[[Setup, MutableSequence[int]], Handler], arguments: list[str]) -> None:
    """The life of a Child. arguments: descriptors of the connection, the lifeline and the file of all counters.

    make: from the setup and the rank's counters to its handler. Does not return.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    control, lifeline, beats = map(int, arguments)
    connection = Connection(control)
    setup: Setup = connection.recv()
    counters: Any = Beats(beats, setup.size).of(setup.rank)
    threading.Thread(target=_pulse, args=(lifeline, counters), daemon=True).start()
    wake_in_time()
    code = serve(connection, setup, lambda: make(setup, counters))
    # Threads of torch or NCCL that wait for dead peers must not keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wake_in_time() -> None:
    """Let this thread's sleeps end within a microsecond of their time: Linux takes 50 more, to save energy.

    Measured: a glance that is to last 20 us lasts 105 to 130 without this, and 60 with it. Elsewhere it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1000), 0, 0, 0)


def serve(connection: Connection, setup: Setup, make: Callable[[], Handler]) -> int:
    """Carry out commands until "exit", or until the driver is gone. Returns the exit code."""
    try:
        handler, answers = make(), _Answers(connection)
        while (message := answers.next_command()) is not None:
            number, command, payload = message
            answers.give(number, *_carry_out(handler.handle, command, payload))
        handler.close()
    except BaseException as error:  # noqa: BLE001 - whatever it was, the driver is told, and the process ends
        traceback.print_exc()
        print(f"rank {setup.rank} ends: {type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        _tell(connection, (0, "died", f"{type(error).__name__}: {error}"))
        return 1
    return 0


class _Answers:
    """Sends answers, and those that come later when they are there."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._late: deque[tuple[int, Later]] = deque()

    def next_command(self) -> tuple[int, str, Any] | None:
        """Wait for the next command, or for the end: None."""
        try:
            while self._late and not self._connection.poll():
                if self._late[0][1].ready():
                    self._give_first()
                else:
                    time.sleep(_GLANCE_SECONDS)
            message: tuple[int, str, Any] = self._connection.recv()
        except (EOFError, OSError):
            return None
        return None if message[1] == "exit" else message

    def give(self, number: int, verdict: str, answer: Any) -> None:
        """Answer a command, after all those before it."""
        if isinstance(answer, Later):
            self._late.append((number, answer))
        elif answer is not SILENT:
            while self._late:
                self._give_first()
            put(self._connection, (number, verdict, answer))

    def _give_first(self) -> None:
        number, later = self._late.popleft()
        put(self._connection, (number, *_carry_out(later.result)))


def _carry_out(work: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    try:
        return "done", work(*arguments)
    except FlexMoEError as error:
        return "refused", (type(error).__name__, str(error))


def _tell(connection: Connection, message: tuple[int, str, Any]) -> None:
    """Send, unless nobody listens any more."""
    try:
        put(connection, message)
    except OSError:
        return


def put(connection: Connection, message: Any) -> None:
    """Send a message by value. Connection.send would pass tensors as shared memory, which this end may not outlive."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def _pulse(lifeline: int, counters: MutableSequence[int]) -> None:
    """Show that the process runs; end it when the lifeline's other end closes, even if its holder died unawares."""
    while True:
        counters[LIFE] += 1
        if select.select([lifeline], [], [], _PULSE_SECONDS)[0]:
            os._exit(1)
