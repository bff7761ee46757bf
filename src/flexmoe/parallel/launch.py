"""Start the ranks of a model. Enters: how many, and the module that each runs. Leaves: Members, and where they meet.

`spawn` makes them children of this process, each with a log of its own. Under `torchrun` the processes are there
already: `joined_by_torchrun` says so, `gather` collects them on the first, and `report` is what the others do. Those
that Ray places on other machines come from ray.py.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Protocol

from flexmoe.parallel.beats import Beats
from flexmoe.parallel.child import SAFE_ENVIRONMENT, Child, Process
from flexmoe.parallel.mesh import TCPStore
from flexmoe.parallel.network import accept, is_loopback, own_address
from flexmoe.parallel.rank import Handler, Setup, serve

_LOOPBACK = "127.0.0.1"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_CONTROL = "flexmoe/control"  # key of the store under which the first rank says where it listens


@dataclass(slots=True)
class Member:
    """One rank as its supervisor sees it. process: None if torchrun started it. node: its machine, if not this one."""

    rank: int
    connection: Connection
    process: Process | None = None
    node: str = ""

    def kill(self) -> None:
        """End the process; when this returns it is gone."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """Let go of what leads to the process. May be called twice."""
        if self.process is not None:
            self.process.close()
        self.connection.close()


class Counters(Protocol):
    """What tells a hang from work; see beats.py."""

    def read(self, kind: int) -> list[int]:
        """One counter of every rank."""


@dataclass(slots=True)
class Launched:
    """Ranks that were started. store: where they meet, held by whoever made it. beats: None if they cannot be read.

    after: lets go of what else was taken for them; called once they have ended.
    """

    members: list[Member]
    beats: Counters | None = None
    store: Any = field(default=None, repr=False)
    after: Callable[[], None] | None = None

    def release(self) -> None:
        """Let go of everything but the processes, which must have ended."""
        for member in self.members:
            member.close()
        self.store = self.beats = None
        if self.after is not None:
            self.after()

    def abandon(self) -> None:
        """End the processes and let go of everything."""
        for member in self.members:
            member.kill()
        self.release()


def spawn(module: str, size: int, timeout: float) -> Launched:
    """Start `size` processes that call `run()` of a module. timeout: seconds that a collective of theirs may take."""
    # Bound here and not in the first rank: the port is free for sure, and nobody has to tell it.
    store = TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
    launched = Launched([], store=store)
    try:
        with Beats.file(size) as file:
            launched.beats = Beats(file, size)
            for rank in range(size):
                launched.members.append(_start(module, rank, file))
        for member in launched.members:
            with contextlib.suppress(OSError):  # it is dead already, which its supervisor tells better
                member.connection.send(Setup(member.rank, size, member.rank, size, _LOOPBACK, store.port, timeout))
    except BaseException:
        launched.abandon()
        raise
    return launched


def _start(module: str, rank: int, beats: int) -> Member:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = Child(module, theirs, beats)
        return Member(rank, Connection(ours.detach()), process)


def joined_by_torchrun() -> bool:
    """Whether torchrun, or something that speaks like it, started this process as one of several."""
    return all(name in os.environ for name in _TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def torchrun_setup(timeout: float) -> Setup:
    """This process's place among those that torchrun started."""
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return Setup(rank, size, local, machine, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)


def gather(setup: Setup, make: Callable[[Setup, MutableSequence[int]], Handler]) -> Launched:
    """On the first process of torchrun: connections to all ranks. It works as a rank itself, in a thread."""
    os.environ.update(SAFE_ENVIRONMENT)
    store = TCPStore(setup.host, setup.port, is_master=False)
    key = secrets.token_bytes(32)
    inner, outer = _addresses(setup)
    with Listener((inner, 0), backlog=setup.size) as listener:
        store.set(_CONTROL, f"{outer} {listener.address[1]} {key.hex()}")
        members = [Member(*_accept(listener, key)) for _ in range(setup.size - 1)]
    ours, theirs = Pipe()
    threading.Thread(target=serve, args=(theirs, setup, lambda: make(setup, [0, 0])), daemon=True).start()
    return Launched([Member(0, ours), *sorted(members, key=lambda member: member.rank)], store=store)


def report(setup: Setup, make: Callable[[Setup, MutableSequence[int]], Handler]) -> int:
    """On the other processes of torchrun: serve as a rank until the first one ends. Returns the exit code."""
    os.environ.update(SAFE_ENVIRONMENT)
    host, port, key = TCPStore(setup.host, setup.port, is_master=False).get(_CONTROL).decode().split()
    connection = Client((host, int(port)), authkey=bytes.fromhex(key))
    connection.send(setup.rank)
    return serve(connection, setup, lambda: make(setup, [0, 0]))


def _accept(listener: Listener, key: bytes) -> tuple[int, Connection]:
    connection = accept(listener, key)
    return connection.recv(), connection


def _addresses(setup: Setup) -> tuple[str, str]:
    """Where the first process listens, and the name by which the others reach it."""
    own = own_address(setup.host, setup.port)
    if is_loopback(own) and not is_loopback(setup.host):  # the store is here, and this machine's name leads inwards
        return "", setup.host
    return own, own
