"""A connection that does not wait for ever. Enters: bytes of a client. Leaves: uvicorn's requests, or a closed door.

uvicorn waits without end for a client that sends a request byte by byte, or does not read its answer, and takes headers
of any length. Here a client is always due something, within some seconds: headers, a body even if nobody wants it, or
room for the answer; only while an answer is being made it may be idle. Who sends a body too slowly to be answered is
told so before the door closes, in limits.py, where bodies have a limit of bytes as well.

However many connect, half of the files that the process may open are left for the engine, which dies where it cannot
open one.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD = 2**16  # bytes
_FILES = 2**16  # that a process should be allowed to have open


class Patient(HttpToolsProtocol):
    """Closes a connection that is too slow, or whose request line and headers are too long."""

    seconds = 20.0  # for request line and headers
    body_seconds = 40.0
    unread_seconds = 120.0  # without reading some tens of kilobytes of what waits for the client
    most = 2**15  # connections at a time; more are turned away without a word
    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _in_head = False
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > _MAX_HEAD:
            self.transport.close()

    def on_message_begin(self) -> None:
        if not self._in_head:  # it came right behind another one
            self._begin_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._wait(self.body_seconds)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._wait(None)
        if self.cycle.response_complete:
            self._begin_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._deadline is None and not self.pipeline:
            self._begin_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _begin_head(self) -> None:
        self._in_head, self._head = True, 0
        self._wait(self.seconds)

    def _wait(self, seconds: float | None) -> None:
        """Close the door after so many seconds from now, or wait for nothing."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None
        if seconds is not None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._deadline = None
        if self.pipeline:  # it is not read from before an earlier request has its answer
            self._wait(self.seconds)
        else:
            self.transport.close()


def patient_protocol(seconds: float, most: int) -> type[Patient]:
    """The protocol class for so many connections, which have so many seconds to say what they want."""
    return type("Patient", (Patient,), {"seconds": seconds, "body_seconds": 2 * seconds, "most": most})


def room_for_connections() -> int:
    """How many connections this process can have; raises its limit of open files, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if wanted > soft != resource.RLIM_INFINITY:
        with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit that they do not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _FILES // 2 if soft == resource.RLIM_INFINITY else max(1, soft // 2)
