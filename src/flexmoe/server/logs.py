"""The log, a line of JSON for each event; and the outermost layer, which gives requests their ids and logs them."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections import Counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexmoe.server.errors import as_api_error

_log = logging.getLogger("flexmoe.server")
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class JSONFormatter(logging.Formatter):
    """time, level, logger, message, and what was passed as extra={"fields": {...}}."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Logged:
    """Gives each request an id, answers what nobody else answered, and logs it once it is over.

    An endpoint adds to the line what it puts into the scope's `state["log"]`. counts: requests by route and status.
    """

    def __init__(self, app: ASGIApp, counts: Counter[tuple[str, int]]) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0
        state = scope.setdefault("state", {})
        state["id"], state["log"] = _request_id(scope), {}
        header = (b"x-request-id", state["id"].encode())

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        try:
            await self._app(scope, receive, marked)
        except Exception as error:  # noqa: BLE001 - it is logged, and told to the client if nothing was told yet
            if not status:
                await as_api_error(error).response()(scope, receive, marked)
            elif status < 500:  # else it was that error which was told, and logged
                _log.error("an answer broke off", exc_info=error, extra={"fields": {"id": state["id"]}})
        finally:
            self._record(scope, status, time.monotonic() - start)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """status 0: the client left before it had an answer."""
        route = getattr(scope.get("route"), "path", "other")
        self._counts[route, status] += 1
        fields = {
            "id": scope["state"]["id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status or "disconnected",
            "seconds": round(seconds, 4),
            **scope["state"]["log"],
        }
        _log.info("request", extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    """The client's, if it gave one that is safe to write down."""
    given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"").decode("latin-1")
    return given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
