"""An OpenAI endpoint as the engine to compare with. Enters: a question. Leaves: the events of its stream.

The server asks, not the page: so no other origin must allow it, and a key stays here. Only the URL that the operator
gave is asked; where it redirects to is not followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from flexmoe.errors import ConfigError
from flexmoe.server.errors import APIError
from flexmoe.server.rival import Question, Times
from flexmoe.server.stream import event_of

THREAD = "flexmoe.compare"
_PATIENCE = 120.0  # seconds without a byte
_MOST_BYTES = 2**20  # of a line, and of a list of models

Tell = Callable[[dict[str, Any] | Exception | None], None]


class Endpoint:
    """A server that speaks OpenAI's API, at a URL that ends with its version: http://host:port/v1."""

    def __init__(self, url: str, key: str | None) -> None:
        """Raises ConfigError for what is no URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"compare={url!r} is neither hf nor a URL like http://127.0.0.1:9000/v1.")
        self._host, self._path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
        self._secure = parts.scheme == "https"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def about(self) -> dict[str, str]:
        return {"kind": "url", "name": f"{self._host}{self._path}"}

    async def answer(self, question: Question) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

        def tell(line: dict[str, Any] | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended
                loop.call_soon_threadsafe(lines.put_nowait, line)

        asking = _Asking(self._connect)
        threading.Thread(target=self._ask, args=(question, tell, asking), name=THREAD, daemon=True).start()
        try:
            while (line := await lines.get()) is not None:
                if isinstance(line, Exception):
                    raise APIError(502, f"{self._host} failed: {line}", code="rival_failed") from line
                yield event_of(line, name="status" if "state" in line else None)
        finally:
            asking.end()

    async def close(self) -> None:
        """There is nothing to end."""

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, timeout=_PATIENCE)

    def _ask(self, question: Question, tell: Tell, asking: _Asking) -> None:
        """In a thread: what comes is told line by line, then None or what went wrong; until nobody wants it."""
        try:
            body = json.dumps(_body(question, self._model(asking)))
            tell({"state": "ready"})
            with asking.connected() as connection:
                times = Times(time.monotonic())
                connection.request("POST", f"{self._path}/chat/completions", body, self._headers)
                for line in _data(_ok(connection.getresponse())):
                    tell(_passed_on(line, times))
            tell(None)
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            tell(error)

    def _model(self, asking: _Asking) -> str:
        """The first model that it serves."""
        with asking.connected() as connection:
            connection.request("GET", f"{self._path}/models", headers=self._headers)
            found = json.loads(_ok(connection.getresponse()).read(_MOST_BYTES))
        return str(found["data"][0]["id"])


class _Asking:
    """The connection through which somebody asks in a thread, to be ended from another."""

    def __init__(self, connect: Callable[[], http.client.HTTPConnection]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._over = False

    @contextlib.contextmanager
    def connected(self) -> Iterator[http.client.HTTPConnection]:
        """Raises ConnectionError once it is over."""
        with contextlib.closing(self._connect()) as connection:
            connection.connect()
            with self._lock:
                if self._over:
                    raise ConnectionAbortedError("nobody waits for the answer any more")
                self._socket = connection.sock
            try:
                yield connection
            finally:
                with self._lock:
                    self._socket = None

    def end(self) -> None:
        """Nobody wants the answer: whoever reads from the connection finds its end."""
        with self._lock, contextlib.suppress(OSError):  # the other side may have gone first
            self._over = True
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)


def _body(question: Question, model: str) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": list(question.messages),
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | ({"ignore_eos": True} if question.ignore_eos else {})  # not OpenAI's, but many servers know it


def _passed_on(line: dict[str, Any], times: Times) -> dict[str, Any]:
    """What the page reads of an event, with times beside the number of tokens."""
    if any(choice.get("delta", {}).get("content") for choice in line.get("choices") or ()):
        times.token(time.monotonic())
    told = {key: line[key] for key in ("choices", "usage", "error") if line.get(key) is not None}
    return told | ({"timings": times.told(line["usage"]["completion_tokens"])} if line.get("usage") else {})


def _ok(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if response.status != 200:
        raise ConnectionError(f"it answered with status {response.status}")
    return response


def _data(response: http.client.HTTPResponse) -> Any:
    """The JSON of each event."""
    while line := response.readline(_MOST_BYTES):
        text = line.strip()
        if text.startswith(b"data:") and text != b"data: [DONE]":
            yield json.loads(text.removeprefix(b"data:"))
