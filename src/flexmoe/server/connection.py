"""A connection that does not wait for ever. Enters: bytes of a client. Leaves: uvicorn's requests, or a closed door.

uvicorn waits without end for a client that sends its request line and headers byte by byte, and takes headers of any
length. Here they must be complete within some seconds and some bytes. Bodies have limits of their own in limits.py.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD = 2**16  # bytes


class Patient(HttpToolsProtocol):
    """Closes a connection whose request line and headers are too slow or too long."""

    seconds = 20.0
    _deadline: asyncio.TimerHandle | None = None
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is not None:
            self._head += len(data)
        super().data_received(data)
        if self._deadline is not None and self._head > _MAX_HEAD:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def _wait(self) -> None:
        if self._deadline is None:
            self._head = 0
            self._deadline = self.loop.call_later(self.seconds, self.transport.close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def patient_protocol(seconds: float) -> type[Patient]:
    """The protocol class for connections that have so many seconds to say what they want."""
    return type("Patient", (Patient,), {"seconds": seconds})
