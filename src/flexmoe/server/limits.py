"""What a request passes before it reaches its endpoint. Enters: an ASGI app. Leaves: one that refuses what it should.

Authorised    asks for a key, unless none is set; health checks and the web page need none
Bounded       refuses bodies that are too long, come too slowly, or are not JSON
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexmoe.server.errors import APIError

OPEN_PATHS = ("/", "/health", "/health/live", "/health/ready")
OPEN_FOLDER = "/static/"  # of the web page, which asks for a key itself


class Authorised:
    """Lets those through who show one of the keys as `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]) or self._knows(_header(scope, b"authorization")):
            await self._app(scope, receive, send)
            return
        error = APIError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _knows(self, header: bytes) -> bool:
        """Takes as long for a wrong key as for a right one, whichever it is."""
        kind, _, given = header.partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(found)


class Bounded:
    """Reads the body of a request whole, within limits of bytes and seconds, and then passes it on."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            _check_type(scope)
            body = await asyncio.wait_for(self._read(scope, receive), self._seconds)
        except APIError as error:
            await error.response()(scope, receive, send)
        except TimeoutError:
            await self._too_slow().response()(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client left before it was complete."""
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > self._max_bytes:
            raise self._too_long()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_long()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_slow(self) -> APIError:
        message = f"the request did not arrive within {self._seconds:g} s."
        return APIError(408, message, code="request_timeout", headers={"Connection": "close"})

    def _too_long(self) -> APIError:
        # The rest of the body is still on its way: it must not be taken for the next request.
        return APIError(
            413,
            f"the body is longer than {self._max_bytes} bytes; send less, or raise --max-body-bytes.",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _check_type(scope: Scope) -> None:
    """JSON only. A web page cannot send that to another origin without being allowed, so CORS guards it."""
    kind = _header(scope, b"content-type").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise APIError(
            415,
            f"the content type is {kind.decode('latin-1')!r}; send JSON, with 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that is read again, then what follows it: the disconnect."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return rest.pop() if rest else await receive()

    return again


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
