"""A small OpenAI server with known manners, for tests of clients. Enters: how to behave. Leaves: a URL, what was asked.

It speaks HTTP with nothing but asyncio, in a thread of its own, so that it can misbehave as no framework would. A
request's `seed` picks its behaviour; "ok" streams `max_tokens` words, `gap` seconds apart; with "leave" the server is
gone for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter

MODELS = {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "fake", "vocab_size": 50}]}


class FakeServer:
    """A context manager; `requests` holds the bodies of all completions asked for, in the order of their arrival."""

    def __init__(
        self,
        behaviours: Mapping[int, str] | None = None,
        *,
        gap: float = 0.0,
        key: str | None = None,
        models: Any = MODELS,
        usage: bool = True,
        engine: Any = None,
        together: int = 0,
        engine_gap: float | None = None,
    ) -> None:
        """engine: what FlexMoE's server says of its engine; None: there is no such page.

        gap: seconds before each piece of a stream. engine_gap: of these the engine's, as FlexMoE's server tells it.
        together: nobody gets an answer before so many have asked at once.
        """
        self._behaviours, self._gap, self._key, self._models, self._usage = behaviours or {}, gap, key, models, usage
        self._engine, self._together, self._engine_gap = engine, together, engine_gap
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.url = ""

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close all connections, and refuse new ones."""
        with contextlib.suppress(RuntimeError):  # it left by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop, self._met = asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connection(self, reader: Reader, writer: Writer) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            writer.close()

    async def _request(self, reader: Reader, writer: Writer) -> bool:
        """Answer one request; False if the connection is to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split()[1]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if self._key is not None and headers.get("authorization") != f"Bearer {self._key}":
            return await _json(writer, "401 Unauthorized", {"error": {"message": "wrong key"}})
        if path == "/v1/models":
            return await _json(writer, "200 OK", self._models)
        if path == "/version":
            return await _json(writer, "200 OK", {"version": "1.2.3"})
        if path == "/v1/flexmoe/about" and self._engine is not None:
            return await _json(writer, "200 OK", {"engine": self._engine})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return await _json(writer, "404 Not Found", {"error": "no such page"})
        asked = json.loads(body) | {"path": path}
        self.requests.append(asked)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if self.most_running >= self._together:
            self._met.set()
        try:
            await self._met.wait()
            return await self._behave(writer, asked, self._behaviours.get(asked["seed"], "ok"))
        finally:
            self.running -= 1

    async def _behave(self, writer: Writer, asked: dict[str, Any], behaviour: str) -> bool:
        if behaviour == "429":
            return await _json(writer, "429 Too Many Requests", {"error": {"message": "too many requests"}})
        if behaviour == "500":
            return await _json(writer, "500 Internal Server Error", "it broke")
        if behaviour == "strict":
            return await _json(writer, "422 Unprocessable Entity", {"error": {"message": "unknown field ignore_eos"}})
        if behaviour == "html":
            return await _plain(writer, "200 OK", "text/html", b"<p>hello</p>")
        if behaviour == "no http":
            writer.write(b"\x00\x01\x02 what?\r\n\r\n")
            return False
        if behaviour == "hang":
            await asyncio.sleep(60)
        if behaviour == "leave":
            self._stop.set()
            return False
        if not asked["stream"]:
            await asyncio.sleep(asked["max_tokens"] * (self._engine_gap or 0.0))
            return await _json(writer, "200 OK", {"choices": []})
        return behaviour != "close" and await self._stream(writer, asked, behaviour)

    async def _stream(self, writer: Writer, asked: dict[str, Any], behaviour: str) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        count = asked["max_tokens"]
        for number in range(count):
            await asyncio.sleep(self._gap)
            if number == 2 and behaviour in _MID_STREAM:
                return await _MID_STREAM[behaviour](writer)
            reason = "length" if number == count - 1 else None
            await _event(writer, {"choices": [_choice(asked["path"], f" {number}", reason)]})
        if self._usage:
            usage = {"prompt_tokens": 7, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}}
            times = {} if self._engine_gap is None else {"timings": {"ttft": self._engine_gap}}
            await _event(writer, {"choices": [], "usage": usage, **times})
        await _chunk(writer, b"data: [DONE]\n\n")
        await _chunk(writer, b"")
        return True


def _choice(path: str, text: str, reason: str | None) -> dict[str, Any]:
    part = {"text": text} if path == "/v1/completions" else {"delta": {"content": text}}
    return {"index": 0, "finish_reason": reason, **part}


async def _drop(writer: Writer) -> bool:
    return False


async def _truncate(writer: Writer) -> bool:
    """End the stream as HTTP wants it, but without the rest of the answer."""
    await _chunk(writer, b"")
    return True


async def _garbage(writer: Writer) -> bool:
    await _chunk(writer, b"data: {not json\n\n")
    return False


async def _error(writer: Writer) -> bool:
    await _event(writer, {"error": {"message": "the engine died", "type": "server_error"}})
    return False


_MID_STREAM = {"drop": _drop, "truncate": _truncate, "garbage": _garbage, "error": _error}


async def _event(writer: Writer, value: Any) -> None:
    await _chunk(writer, f"data: {json.dumps(value)}\n\n".encode())


async def _chunk(writer: Writer, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()


async def _json(writer: Writer, status: str, value: Any) -> bool:
    return await _plain(writer, status, "application/json", json.dumps(value).encode())


async def _plain(writer: Writer, status: str, kind: str, data: bytes) -> bool:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return True
