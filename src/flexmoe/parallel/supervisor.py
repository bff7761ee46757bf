"""Supervisor: the driver's side of a launch. Enters: Members. Leaves: their answers, or an error that names the rank.

The driver is the user's process. It has no part in any collective: every rank is a child (under torchrun a process or
thread of its own), and talks to the driver over a connection. So whatever a rank does, die or hang, in a collective or
in code that never comes back to Python, the driver can say so and end the others. The first rank in the driver itself
would save a hop of some 50 us a step, but an all-reduce of NCCL that a dead peer does not join cannot be left again.

Two threads do all the talking, so that Ctrl-C, which only meets the main thread, never cuts a message in two: one
sends, one listens and watches. A death shows at once, as the end of its connection. A hang shows when for `timeout`
seconds no rank that owes an answer has begun a collective (while they load: has shown a sign of life); the one that
began the fewest is named. Then all are killed.
"""

from __future__ import annotations

import logging
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from flexmoe import errors
from flexmoe.errors import EngineError, FlexMoEError, RankError
from flexmoe.parallel.beats import LIFE, WORK
from flexmoe.parallel.launch import Launched, Member

_log = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
# When one rank dies its peers report broken connections: wait so long for the one that died without a word.
_GRACE_SECONDS = 0.4
_EXIT_SECONDS = 10.0  # a busy machine takes several to end a process that has nothing left to do
_IMPORT_SECONDS = 120.0  # until a new process shows its first sign of life
_CODE_SECONDS = 2.0  # from the end of a connection to the exit code
_LAST_LINES = 6


class _Trouble(NamedTuple):
    """What is wrong with a rank. silent: it died without a word, so that it is the cause and no victim."""

    error: RankError
    silent: bool


class _Command(NamedTuple):
    """What is to be sent. owed: the ranks that will answer it."""

    number: int
    owed: frozenset[int]
    message: bytes


class Supervisor:
    """Sends commands to all ranks, collects answers, and ends everything when a rank fails."""

    def __init__(self, launched: Launched, timeout: float, describe: Callable[[int], str]) -> None:
        """timeout: seconds, see above. describe: a rank's place, for errors."""
        self.members = launched.members
        self._launched, self._timeout, self._describe = launched, timeout, describe
        self._numbers, self._doing, self._patient = 0, "starting", True
        self._wanted: dict[int, frozenset[int]] = {}  # by command, the main thread's: who answers
        self._answers: dict[int, dict[int, Any]] = {}
        self._refusals: dict[int, FlexMoEError] = {}
        self._owed: dict[int, set[int]] = {}  # by command, under the lock: who has not answered yet
        self._lock, self._kill_lock = threading.Lock(), threading.Lock()
        self._outbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[tuple[int, int, str, Any] | None] = queue.SimpleQueue()
        self._failure: RankError | None = None
        self._closing = self._killed = self._gone = False
        self._moved = time.monotonic()
        self._seen: tuple[list[int], list[int], list[float]] = ([], [], [])
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._send)]
        for thread in reversed(self._threads):  # a rank may be dead already: who hears of it waits for the other thread
            thread.start()

    def check(self) -> None:
        """Raise the error that ended the ranks, if one did."""
        if self._failure is not None:
            failure = self._failure
            raise RankError(str(failure), failure.rank, failure.exit_code)
        if self._killed:
            raise EngineError("the processes of the engine have ended.")

    def post(self, command: str, payload: Any, doing: str, *, owed: Collection[int], patient: bool = False) -> int:
        """Send a command to all ranks and return its number. owed: the ranks that will answer.

        doing: what they do, for errors. patient: it begins no collectives for long, as in loading.
        """
        self.check()
        self._numbers += 1
        self._doing, self._patient, self._moved = doing, patient, time.monotonic()
        message = pickle.dumps((self._numbers, command, payload), pickle.HIGHEST_PROTOCOL)
        self._wanted[self._numbers] = frozenset(owed)
        # One call that Ctrl-C cannot cut in two: an answer is owed by those who were asked, or nobody waits for one.
        self._outbox.put(_Command(self._numbers, frozenset(owed), message))
        return self._numbers

    def wait(self, number: int, *, forget: bool = True) -> dict[int, Any]:
        """The answers to a command by rank, once all are there.

        forget: nobody will wait for earlier commands any more. Raises RankError if a rank died or hangs, and the first
        error on purpose that a rank answered with.
        """
        if forget:
            self._forget_before(number)
        answers = self._answers.setdefault(number, {})
        while number not in self._refusals and self._wanted[number] - answers.keys():
            self.check()
            message = self._inbox.get()
            if message is not None and message[0] in self._wanted:
                self._take(*message)
        if number in self._refusals:
            raise self._refusals.pop(number)
        del self._wanted[number]
        return self._answers.pop(number)

    def _take(self, number: int, rank: int, verdict: str, answer: Any) -> None:
        """Keep an answer that somebody waits for, or will."""
        if verdict == "refused":
            self._refusals.setdefault(number, _rebuilt(*answer))
        else:
            self._answers.setdefault(number, {})[rank] = answer

    def _forget_before(self, number: int) -> None:
        for old in [n for n in self._wanted if n < number]:
            del self._wanted[old]
            self._answers.pop(old, None)
            self._refusals.pop(old, None)

    def close(self) -> None:
        """End all ranks in order. Raises RankError if one of them dies or hangs over it."""
        if self._killed:
            self.kill()
            return
        self._doing, self._closing = "closing", True
        self._outbox.put(_Command(0, frozenset(), pickle.dumps((0, "exit", None))))
        self._threads[0].join(_EXIT_SECONDS)
        alive = [m for m in self.members if m.process is not None and not m.process.ended()]
        if alive and self._failure is None:
            self._failure = self._error(alive[0], None, f"hangs: it has not ended in {_EXIT_SECONDS:g} s")
        self.kill()
        if self._failure is not None:
            self.check()

    def kill(self) -> None:
        """End all ranks now. May be called twice, from any thread; when it returns they are gone."""
        with self._kill_lock:
            if self._gone:
                return
            self._killed = True
            for member in self.members:
                member.kill()
            self._outbox.put(None)
            for thread in self._threads:  # they end now: a connection is not closed under their hands
                if thread is not threading.current_thread():
                    thread.join(1.0)
            self._release()
            self._gone = True  # only now: what Ctrl-C cuts short is done once more
        self._inbox.put(None)

    def _release(self) -> None:
        """A cluster that is gone with a rank takes nothing back: whoever waits must hear of the rank all the same."""
        try:
            self._launched.release()
        except Exception:  # noqa: BLE001 - logged
            _log.exception("not all that was taken for the ranks could be given back")

    def _send(self) -> None:
        while (command := self._outbox.get()) is not None:
            with self._lock:
                self._owed[command.number] = set(command.owed)
            for member in self.members:
                try:
                    member.connection.send_bytes(command.message)
                except OSError:  # it is dead, which the watcher sees
                    continue

    def _watch(self) -> None:
        try:
            self._watch_all()
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, and nobody may be left running
            self._fail(RankError(f"the ranks cannot be watched any more: {type(error).__name__}: {error}", -1))

    def _watch_all(self) -> None:
        live: dict[Connection, Member] = {member.connection: member for member in self.members}
        while live and not self._killed:
            for ready in connection.wait(list(live), _TICK_SECONDS):
                trouble = self._hear(live[ready], live)  # type: ignore[index]
                if trouble is not None:
                    self._fail(self._root(trouble, live))
                    return
            hung = None if self._closing else self._hung()
            if hung is not None:
                self._fail(self._error(hung, None, f"hangs: no sign of work for {self._timeout:g} s"))
                return

    def _hear(self, member: Member, live: dict[Connection, Member]) -> _Trouble | None:
        """Take one message of a rank, or its end. Returns what is wrong, if anything is."""
        try:
            number, verdict, answer = member.connection.recv()
        except (EOFError, OSError):
            del live[member.connection]
            return self._ended(member)
        self._moved = time.monotonic()
        with self._lock:
            owed = self._owed.get(number, set())
            expected = member.rank in owed
            owed.discard(member.rank)
            if not owed:
                self._owed.pop(number, None)
        if not expected:
            what = answer if verdict == "died" else ": ".join(map(str, answer))
            return _Trouble(self._error(member, 1, f"failed with {what}"), silent=False)
        self._inbox.put((number, member.rank, verdict, answer))
        return None

    def _ended(self, member: Member) -> _Trouble | None:
        """A connection has ended. None if that is as it should be."""
        if self._killed or (self._closing and member.process is None):
            return None
        process = member.process
        if process is None or (process.ended(_CODE_SECONDS) and process.code is None):
            return _Trouble(self._error(member, None, "is gone: its connection broke"), silent=True)
        code = process.code
        if code is None:
            return _Trouble(self._error(member, None, "broke its connection"), silent=True)
        if self._closing and code == 0:
            return None
        return _Trouble(self._error(member, code, f"died with exit code {code}{_signal_name(code)}"), silent=True)

    def _root(self, trouble: _Trouble, live: dict[Connection, Member]) -> RankError:
        """The error that began it: of the rank that died without a word, else the first that was told."""
        deadline = time.monotonic() + _GRACE_SECONDS
        told = {trouble.error.rank}
        while not trouble.silent and live and (left := deadline - time.monotonic()) > 0:
            for ready in connection.wait(list(live), left):
                other = self._hear(live[ready], live)  # type: ignore[index]
                if other is not None and other.silent and other.error.rank not in told:
                    return other.error
                told |= {other.error.rank} if other is not None else set()
        return trouble.error

    def _fail(self, error: RankError) -> None:
        self._failure = error
        self.kill()

    def _hung(self) -> Member | None:
        """The rank that keeps the others waiting, if nothing has moved for too long."""
        beats, now = self._launched.beats, time.monotonic()
        with self._lock:
            owing = next((sorted(ranks) for ranks in self._owed.values() if ranks), None)
        if owing is None or beats is None:
            self._moved = now
            return None
        work, life = beats.read(WORK), beats.read(LIFE)
        old_work, old_life, since = self._seen
        since = [now if not old_life or life[r] != old_life[r] else since[r] for r in range(len(life))]
        if work != old_work:
            self._moved = now
        self._seen = work, life, since
        limits = [self._timeout if life[r] else max(self._timeout, _IMPORT_SECONDS) for r in range(len(life))]
        still = [rank for rank, moved in enumerate(since) if now - max(moved, self._moved) > limits[rank]]
        if still:
            return self.members[still[0]]
        if self._patient or now - self._moved <= self._timeout:
            return None
        behind = [rank for rank, count in enumerate(work) if count == min(work)]
        return self.members[behind[0] if len(behind) < len(work) else owing[0]]

    def _error(self, member: Member, code: int | None, what: str) -> RankError:
        place = self._describe(member.rank)
        where = f"rank {member.rank} of {len(self.members)}" + (f" ({place})" if place else "")
        where += f" on node {member.node}" if member.node else ""
        return RankError(f"{where} {what} while {self._doing}; {_last_words(member)}", member.rank, code)


def _last_words(member: Member) -> str:
    if member.process is None:
        return "its log is where it was started."
    lines = [line.strip() for line in member.process.tail().decode(errors="replace").splitlines()]
    # A fatal signal's stack is of little use in one line; what was said before it is.
    fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
    last = [line for line in lines[: fatal + 1] if line][-_LAST_LINES:]
    return f"its log ends: {' | '.join(last)}" if last else "its log is empty."


def _signal_name(code: int) -> str:
    """(SIGKILL) for -9."""
    try:
        return f" ({signal.Signals(-code).name})" if code < 0 else ""
    except ValueError:
        return ""


def _rebuilt(name: str, message: str) -> FlexMoEError:
    """An error that a rank raised on purpose. Some classes take more than a message, so that none is asked to."""
    kind = getattr(errors, name, EngineError)
    error: FlexMoEError = kind.__new__(kind)
    Exception.__init__(error, message)
    return error
