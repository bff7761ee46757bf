"""A rank on another machine: the keeper that starts it there, and what stands for its process here.

Enters: an Order from the driver, over a connection of the keeper's own. Leaves: Reports of how the rank is, several
times a second, with the end of its log, so that the last words are here even if its machine is lost. The rank itself
talks to the driver over a second connection, as a child of the driver would: it does not know where it was started.

Whoever loses the other, ends: the keeper kills the rank when the driver's connection closes, and the rank ends when
the keeper does. The keeper knows neither torch nor Ray, which only places it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from typing import NamedTuple

from flexmoe.parallel.beats import LIFE, WORK, Beats
from flexmoe.parallel.child import Child
from flexmoe.parallel.network import accept, shut_down, watch_peer

_REPORT_SECONDS = 0.2
_KILL_SECONDS = 2.0
_CONNECT_SECONDS = 5.0


class Place(NamedTuple):
    """Where a keeper listens, and the GPUs that it was given."""

    host: str
    port: int
    gpus: str


@dataclass(frozen=True, slots=True)
class Order:
    """What a keeper shall start: a module whose run() is the program, as which of how many ranks."""

    module: str
    rank: int
    size: int
    environment: Mapping[str, str] = field(default_factory=dict)


class Report(NamedTuple):
    """How a rank is. tail: the end of its log, None if that is as before. code: its exit code, once it has one."""

    pid: int
    beats: Sequence[int]
    tail: bytes | None
    code: int | None


class Keeper:
    """Starts one rank on its machine and keeps it for a driver elsewhere."""

    def listen(self, host: str, key: bytes) -> Place:
        """Wait for the driver at an address of this machine, from now on. key: by which both know each other."""
        self._listener, self._key = Listener((host, 0)), key
        return Place(host, self._listener.address[1], os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    def run(self) -> None:
        """Let the driver connect, start the rank, and keep it until either ends."""
        with self._listener:
            control = accept(self._listener, self._key)
            order: Order = control.recv()
            connection = accept(self._listener, self._key)
        with control:
            watch_peer(control)
            watch_peer(connection)
            self._keep(order, control, connection)

    def _keep(self, order: Order, control: Connection, connection: Connection) -> None:
        with Beats.file(order.size) as file, socket.socket(fileno=os.dup(connection.fileno())) as theirs, connection:
            beats = Beats(file, order.size).of(order.rank)
            child = Child(order.module, theirs, file, order.environment)
        said, parent = b"", os.getppid()
        with contextlib.suppress(OSError):  # the driver is gone
            while os.getppid() == parent:  # else what placed this keeper is gone, and with it the node for everybody
                ended, tail = child.ended(), child.tail()
                code = child.code if ended else None
                control.send(Report(child.pid, (beats[WORK], beats[LIFE]), None if tail == said else tail, code))
                said = tail
                if ended or (control.poll(_REPORT_SECONDS) and not self._goes_on(control, child)):
                    break
        child.kill()
        child.close()

    def _goes_on(self, control: Connection, child: Child) -> bool:
        """The driver says nothing but "kill", after which the rank's end is reported; else it is gone."""
        try:
            control.recv()
        except EOFError:
            return False
        child.kill()
        return True


class KeptProcess:
    """The process of a rank that a keeper has started, as the keeper reports it."""

    def __init__(self, place: Place, key: bytes, order: Order) -> None:
        """Raises OSError if the keeper cannot be reached."""
        # Client itself would wait for minutes where a firewall swallows all.
        socket.create_connection((place.host, place.port), _CONNECT_SECONDS).close()
        self._control = Client((place.host, place.port), authkey=key)
        watch_peer(self._control)
        self._control.send(order)
        self.connection = Client((place.host, place.port), authkey=key)
        watch_peer(self.connection)
        self._tail = b""
        self._hear()
        self._over, self._lock = threading.Event(), threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._report.pid

    @property
    def code(self) -> int | None:
        return self._report.code

    @property
    def beats(self) -> Sequence[int]:
        return self._report.beats

    def ended(self, seconds: float = 0.0) -> bool:
        return self._over.wait(seconds)

    def kill(self) -> None:
        """End it. When this returns it is gone, or its keeper does not answer and whoever placed that must end it."""
        with self._lock, contextlib.suppress(OSError):  # of one that is over already
            self._control.send("kill")
        self._over.wait(_KILL_SECONDS)

    def tail(self) -> bytes:
        return self._tail

    def close(self) -> None:
        """Let go of the keeper, which ends then."""
        with self._lock, contextlib.suppress(OSError):
            shut_down(self._control)  # wakes the thread that listens, which closes it

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while self.code is None:
                self._hear()
        self._over.set()
        with self._lock:
            self._control.close()

    def _hear(self) -> None:
        self._report: Report = self._control.recv()
        self._tail = self._tail if self._report.tail is None else self._report.tail


class KeptBeats:
    """The counters of ranks that keepers report."""

    def __init__(self, processes: Sequence[KeptProcess]) -> None:
        self._processes = processes

    def read(self, kind: int) -> list[int]:
        """One counter of every rank."""
        return [process.beats[kind] for process in self._processes]
