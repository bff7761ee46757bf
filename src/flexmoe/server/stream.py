"""How answers travel. Enters: work that makes an answer. Leaves: JSON, or server-sent events.

A client that goes away ends the work: its streams are closed, which frees what the request held.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flexmoe.server.errors import as_api_error

DONE = b"data: [DONE]\n\n"


class Answer(Response):
    """A JSON answer that is made while the client is watched."""

    media_type = "application/json"

    def __init__(self, make: Callable[[], Awaitable[Any]], close: Callable[[], None]) -> None:
        """make: gives what json.dumps takes, or raises. close: called when it is over, however it ended."""
        super().__init__()
        self._make, self._close = make, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(scope, receive, send))
        finally:
            self._close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = json.dumps(await self._make(), ensure_ascii=False).encode("utf-8", "replace")
        except Exception as error:  # noqa: BLE001 - the client is told
            await as_api_error(error).response()(scope, receive, send)
            return
        await Response(content, media_type=self.media_type)(scope, receive, send)


class EventStream(Response):
    """Server-sent events, one chunk each. An error on the way is an event, too: the status has been sent by then."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], end: bytes = DONE) -> None:
        """end: sent when the events are over."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._end = events, close, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:  # noqa: BLE001 - the client is told
            await send({"type": "http.response.body", "body": event_of(as_api_error(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


def event_of(data: Any, name: str | None = None) -> bytes:
    """An event with JSON data."""
    head = b"" if name is None else b"event: %s\n" % name.encode()
    return b"%sdata: %s\n\n" % (head, json.dumps(data, separators=(",", ":")).encode())


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work unless the client goes away meanwhile; then it is cancelled."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
