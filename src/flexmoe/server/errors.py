"""Errors as OpenAI's clients know them. Enters: what went wrong. Leaves: a status and an error object, no trace."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from flexmoe.errors import EngineDeadError, FlexMoEError, MissingDependencyError, RequestError, RequestFailedError

_log = logging.getLogger("flexmoe.server")

_TRIED = re.compile(r"(str|int|float|bool)$|(list|dict|constrained-\w+|function-\w+)\[")
_SHOWN = 60  # characters of a wrong value
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What went wrong. param: the field at fault; code: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class APIError(Exception):
    """An answer other than a success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer. ASCII, since the message may quote what is not valid UTF-8."""
        content = json.dumps(self.body).encode()
        return Response(content, self.status, self.headers, "application/json")


def as_api_error(error: Exception) -> APIError:
    """What a client is told of an exception; one that nobody foresaw is logged."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestError):
        return APIError(400, str(error), code="invalid_value")
    if isinstance(error, MissingDependencyError):
        return APIError(501, str(error), code="missing_dependency")
    if isinstance(error, RequestFailedError):
        return APIError(500, str(error), code="request_failed")
    if isinstance(error, EngineDeadError):
        message = "the engine died, and this server ends; its log says why."
        return APIError(503, message, code="engine_dead", headers={"Retry-After": "5"})
    if isinstance(error, FlexMoEError):
        return APIError(503, str(error), code="engine_unavailable", headers={"Retry-After": "5"})
    _log.error("an error that nobody foresaw", exc_info=error)
    return APIError(500, "the server met an error of its own; its log says more.", code="internal_error")


def from_validation(error: RequestValidationError, fields: Sequence[str]) -> APIError:
    """The first complaint about a body, before others that of a field nobody knows: it is likely a misspelt one.

    fields: those that it may have at its top.
    """
    complaints = error.errors()
    first = next((one for one in complaints if one["type"] == "extra_forbidden"), complaints[0])
    place = _place(first)
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first['ctx']['error']}.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return APIError(400, _unknown(place, fields), param=".".join(place), code="unknown_parameter")
    if not place:
        found = "empty" if first["type"] == "missing" else "no JSON object"
        return APIError(400, f"the body is {found}; send a JSON object.", code="invalid_body")
    name = ".".join(place)
    if first["type"] == "unsupported":
        return APIError(400, f"{name} {first['msg']}", param=name, code="unsupported_parameter")
    message = _complaint(name, [one for one in complaints if _place(one) == place])
    return APIError(400, f"{message}.", param=name, code="invalid_value")


async def on_validation(request: Request, error: Exception) -> Response:
    """Handler of FastAPI's own checks."""
    assert isinstance(error, RequestValidationError)
    body = getattr(request.scope.get("route"), "body_field", None)
    kind = getattr(getattr(body, "field_info", None), "annotation", None)
    return from_validation(error, list(getattr(kind, "model_fields", {}))).response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handler of what routing refuses: no such path, no such method, a body that cannot be parsed."""
    assert isinstance(error, HTTPException)
    allowed = [value for name, value in (error.headers or {}).items() if name.lower() == "allow"]
    takes = f"it takes {allowed[0]}" if allowed else "/docs lists what there is"
    messages = {
        404: f"there is nothing at {request.url.path}; /docs lists what there is.",
        405: f"{request.url.path} does not take {request.method}; {takes}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message, headers=error.headers).response()


async def on_error(_: Request, error: Exception) -> Response:
    """Handler of our errors."""
    return as_api_error(error).response()


def _place(complaint: Mapping[str, Any]) -> list[str]:
    """The names and numbers that lead to a field, without pydantic's names of the types it tried."""
    parts = map(str, complaint["loc"])
    return [part for part in parts if part not in ("body", "query", "path") and not _TRIED.match(part)]


def _complaint(name: str, complaints: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a field's value. One of several types has a complaint of each, of which a type that fits and
    a limit that does not say more than types that do not fit.
    """
    limits = [one for one in complaints if not one["type"].endswith("_type")]
    words = []
    for one in limits or complaints:
        if one["type"] == "missing":
            return f"{name} is required"
        if one["type"] == "too_short":
            return f"{name} is too short: {one['ctx']['actual_length']} items; give at least {one['ctx']['min_length']}"
        words.append(one["msg"].removeprefix("Input "))
    return f"{name}={_shown(complaints[0]['input'])} {', or '.join(dict.fromkeys(words))}"


def _shown(value: Any) -> str:
    """A value as the client wrote it, without what is in it if it is long or nested."""
    if isinstance(value, (list, dict)):
        return json.dumps(value) if not value else "[...]" if isinstance(value, list) else "{...}"
    if isinstance(value, str) and len(value) > _SHOWN:
        value = f"{value[:_SHOWN]}..."
    return json.dumps(value)


def _unknown(place: Sequence[str], fields: Sequence[str]) -> str:
    near = difflib.get_close_matches(place[-1], fields, n=1) if len(place) == 1 else []
    hint = f"; did you mean {near[0]!r}?" if near else "; leave it out."
    return f"unknown parameter {'.'.join(place)!r}{hint}"
