"""Clients that misbehave: each gets the right status, or nothing; the server goes on, and holds nothing of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from starlette.types import Receive, Scope, Send

from flexmoe.engine.stand_ins import StandIns
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.server.connection import Patient, room_for_connections
from flexmoe.server.logs import Logged
from tests.server.serving import PATIENCE, Running, running, slowed, wait_for

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, checked to be one."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    return dict(error)


def send(server: Running, content: bytes, kind: str = "application/json", path: str = COMPLETIONS) -> httpx.Response:
    return httpx.post(server.url + path, content=content, headers={"Content-Type": kind}, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "two"]}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": [10**9]}, None),
        ({"prompt": [10**30]}, None),
        ({"prompt": "x", "max_tokens": 0}, None),
        ({"prompt": "x", "max_tokens": "9"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, None),
        ({"prompt": "x", "temperature": True}, "temperature"),
        ({"prompt": "x", "top_p": 0}, None),
        ({"prompt": "x", "n": 0}, None),
        ({"prompt": "x", "n": 10**6}, None),
        ({"prompt": "x", "n": 17}, "n"),
        ({"prompt": "x", "n": 2, "best_of": 1}, None),
        ({"prompt": "x", "best_of": 2, "stream": True}, None),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": ["x"] * 33}, "n"),
        ({"prompt": "x", "stop": ["s"] * 17}, "stop"),
        ({"prompt": "x", "stop": ""}, None),
        ({"prompt": "x", "stop": "s" * 1001}, "stop"),
        ({"prompt": "x", "stop": ["s" * 1001]}, "stop"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, None),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, None),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, None),
        ({"prompt": "x", "seed": 2**70}, None),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format.type"),
        ({"prompt": "x", "guided_regex": "a*"}, "guided_regex"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_field_is_named(server: Running, body: dict[str, Any], param: str | None) -> None:
    error = error_of(server.post(COMPLETIONS, body), 400)
    assert error["type"] == "invalid_request_error"
    assert param is None or (error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "max_completion_tokens": 4},
        {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 7 * 7 }}"},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"self": 1}},
        {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_object"},
            "min_tokens": 2,
        },
    ],
    ids=str,
)
def test_a_wrong_conversation_is_refused(server: Running, body: dict[str, Any]) -> None:
    error_of(server.post(CHAT, body), 400)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt is required."),
        ({"prompt": []}, "prompt is too short: 0 items; give at least 1."),
        ({"prompt": "x", "max_tokens": "5"}, 'max_tokens="5" should be a valid integer.'),
        ({"prompt": "x", "logprobs": 200}, "logprobs=200 should be less than or equal to 20."),
        ({"prompt": "x", "stream": "y" * 99}, f'stream="{"y" * 60}..." should be a valid boolean.'),
        ({"prompt": "x", "temperature": [[1]]}, "temperature=[...] should be a valid number."),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_with_what_it_should_be(server: Running, body: dict[str, Any], message: str) -> None:
    assert error_of(server.post(COMPLETIONS, body), 400)["message"] == message


@pytest.mark.parametrize(("content", "found"), [(b"", "empty"), (b"[]", "no JSON object"), (b"7", "no JSON object")])
def test_a_body_that_is_no_object_is_told_so(server: Running, content: bytes, found: str) -> None:
    assert error_of(send(server, content), 400)["message"] == f"the body is {found}; send a JSON object."


def test_a_schema_may_not_be_huge(server: Running) -> None:
    names = {f"name {number}": {"type": "string"} for number in range(2000)}
    schema = {"name": "x", "schema": {"type": "object", "properties": names}}
    body = {"prompt": "x", "max_tokens": 1, "response_format": {"type": "json_schema", "json_schema": schema}}
    error = error_of(server.post(COMPLETIONS, body), 400)
    assert "at most 32768" in error["message"]


@pytest.mark.parametrize("text", ["Hello world " * 300_000, "</s>" * 90_000], ids=["words", "special tokens"])
def test_a_text_that_is_far_too_long_is_refused_unread(
    server: Running, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("it was encoded"))
    monkeypatch.setattr(StandIns, "encode", lambda *_, **__: pytest.fail("it was encoded"))
    for path, body in (
        (COMPLETIONS, {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        ("/v1/responses", {"input": text}),
        ("/generate/", {"prompt": text}),
    ):
        error = error_of(server.post(path, body), 400)
        assert error["code"] == "context_length_exceeded"
        assert "the prompt has at least " in error["message"]


def test_the_tokens_of_a_long_text_are_told_all_the_same(server: Running) -> None:
    assert server.post("/tokenize", {"prompt": "Hello world " * 9000}).json()["count"] > server.engine.max_model_len
    message = {"role": "user", "content": "Hello world " * 9000}
    assert server.post("/tokenize", {"messages": [message]}).json()["count"] > server.engine.max_model_len


def test_the_nearest_name_is_offered(server: Running) -> None:
    error = error_of(server.post(COMPLETIONS, {"promt": "x"}), 400)
    assert error["code"] == "unknown_parameter"
    assert "did you mean 'prompt'?" in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}",
        b'{"\xc3\x28": 1}',
        b'{"\\udfff": 1, "prompt": "x"}',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_what_is_no_request_is_refused(server: Running, content: bytes) -> None:
    error_of(send(server, content), 400)


MANY = 400_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": [1] * MANY + [""]}),
        (COMPLETIONS, {"prompt": [[""] * MANY, [1]]}),
        (COMPLETIONS, {"prompt": "x", "stop": [1] * MANY}),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [""] * MANY}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(MANY // 2)), "")}),
        (COMPLETIONS, {"prompt": "x", **dict.fromkeys(map(str, range(MANY // 2)), 0)}),
        (CHAT, {"messages": [{}] * MANY}),
        (CHAT, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        ("/v1/responses", {"input": [{}] * MANY}),
        ("/v1/responses", {"input": "x", "metadata": dict.fromkeys(map(str, range(MANY // 2)), 0)}),
        ("/detokenize", {"tokens": [""] * MANY}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_many_times_is_refused_once(server: Running, path: str, body: dict[str, Any]) -> None:
    """A complaint about each entry took a minute for some megabytes, in which nobody else was served."""
    content = json.dumps(body, separators=(",", ":")).encode()
    start = time.process_time()  # of the server, which is in this process; waiting for another program does not count
    error = error_of(send(server, content, path=path), 400)
    assert time.process_time() - start < 4.0
    assert len(error["message"]) < 500


def test_other_types_than_json_are_refused(server: Running) -> None:
    """A page of another origin may send these without being asked for; JSON it may not."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        error_of(send(server, b'{"prompt": "x"}', kind), 415)


def test_a_body_may_not_be_huge(server: Running) -> None:
    limit = server.service.config.max_body_bytes
    error = error_of(send(server, json.dumps({"prompt": "x" * limit}).encode()), 413)
    assert str(limit) in error["message"]

    def endless() -> Iterator[bytes]:
        for _ in range(limit // 2**16 + 2):
            yield b"x" * 2**16

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # the door may close while it still talks
        found = httpx.post(
            server.url + COMPLETIONS, content=endless(), headers={"Content-Type": "application/json"}, timeout=PATIENCE
        )
        error_of(found, 413)


def test_unknown_paths_and_methods(server: Running) -> None:
    error_of(server.get("/v1/nothing"), 404)
    assert error_of(server.get(COMPLETIONS), 405)["message"] == f"{COMPLETIONS} does not take GET; it takes POST."
    error_of(server.get("/v1/models/other"), 404)
    error_of(server.get("/v1/flexmoe/events?interval=0"), 400)
    for path in ("/../../etc/passwd", "/v1/models/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"):
        assert server.get(path).status_code == 404


def test_a_failure_of_our_own_shows_no_trace(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.service, "check_model", fail)
    response = server.post(COMPLETIONS, {"prompt": "x"})
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


def test_an_answer_that_breaks_off_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client has a status already, so that the log alone can say why there is no more."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("the disk is gone")

    async def nothing(*_: Any) -> Any:
        return None

    monkeypatch.setattr(logging.getLogger("flexmoe"), "propagate", True)
    scope: Scope = {"type": "http", "headers": [], "method": "GET", "path": "/static/x"}
    with ThreadPoolExecutor(1) as thread:  # in this one the browser of other tests may have an event loop
        thread.submit(lambda: asyncio.run(Logged(app, Counter())(scope, nothing, nothing))).result()
    assert "the disk is gone" in caplog.text


# ------------------------------------------------------------------------------------------- slow and gone clients


def closed_within(connection: socket.socket, seconds: float) -> bytes:
    """What the server says before it closes the connection, which it must do in time."""
    connection.settimeout(seconds)
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(4096):
            said += piece
    return said


DAWDLERS = {
    "silent": b"",
    "no end of headers": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n",
    "no end of body": (
        b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
    ),
}
ANSWERED = {
    "a refused body": (
        b"POST /v1/completions HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 900\r\n\r\n", b"a"
    ),
    "a body that nobody reads": (b"GET /health HTTP/1.1\r\nContent-Length: 900\r\n\r\n", b"a"),
    "blank lines": (b"GET /health HTTP/1.1\r\n\r\n", b"\r\n"),
    "a body beside an endless answer": (b"GET /v1/flexmoe/events HTTP/1.1\r\nContent-Length: 900\r\n\r\n", b"a"),
}  # fmt: skip


def dawdle(server: Running, head: bytes) -> bytes:
    """Byte by byte, so that the connection is never idle: slowloris."""
    with server.connect() as connection:
        connection.sendall(head)
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 1.5:
                if head:
                    connection.sendall(b"a")
                time.sleep(0.1)
        return closed_within(connection, 20)


def stay(server: Running, head: bytes, more: bytes) -> bytes:
    """Each byte that comes ends uvicorn's own waiting for the next request."""
    with server.connect() as connection:
        connection.sendall(head)
        time.sleep(0.2)
        connection.sendall(more)
        return closed_within(connection, 20)


@pytest.fixture(scope="module")
def told(shared_server: Running) -> Iterator[dict[str, Future[bytes]]]:
    """What each of those who are slow or stay was told before it was shown the door: they come together, being many
    seconds of waiting.
    """
    with ThreadPoolExecutor(len(DAWDLERS) + len(ANSWERED)) as clients:
        slow = {name: clients.submit(dawdle, shared_server, head) for name, head in DAWDLERS.items()}
        yield slow | {name: clients.submit(stay, shared_server, *each) for name, each in ANSWERED.items()}


@pytest.mark.parametrize(("name", "status"), [("silent", b""), ("no end of headers", b""), ("no end of body", b"408")])
def test_who_dawdles_is_shown_the_door(
    server: Running, told: dict[str, Future[bytes]], name: str, status: bytes
) -> None:
    assert status in told[name].result()


@pytest.mark.parametrize("name", ANSWERED)
def test_who_has_his_answer_may_not_stay(server: Running, told: dict[str, Future[bytes]], name: str) -> None:
    assert b"HTTP/1.1 " in told[name].result()


def test_several_requests_may_wait_for_their_answers(server: Running) -> None:
    """Those that come behind another are not read, so that they cannot be late."""
    body = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with server.connect() as connection:
        connection.sendall(b"GET /v1/flexmoe/events?interval=1.5&count=3 HTTP/1.1\r\n\r\n" + head + body[:5])
        time.sleep(1.0)
        connection.sendall(body[5:] + b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        said = closed_within(connection, 20)
    assert said.count(b"HTTP/1.1 200 OK") == 3
    assert said.count(b"event: figures") == 3


def test_endless_headers_are_cut_off(server: Running) -> None:
    with server.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"x: " + b"y" * 2**20)
        closed_within(connection, 20)
    assert server.get("/health").status_code == 200


def test_what_is_not_http_is_refused(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
        assert b"400" in closed_within(connection, 20)


def abort_after(server: Running, body: dict[str, Any], num_bytes: int) -> None:
    """Ask, read a little, and go."""
    with server.connect() as connection:
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        connection.sendall(f"{head}{len(content)}\r\n\r\n".encode() + content)
        if num_bytes:
            assert connection.recv(num_bytes)


def abort_many(server: Running, count: int) -> None:
    """Clients that leave at once, in the first chunk, or while all of the answer is computed."""
    for number in range(count):
        body = {"prompt": f"Once {number}", "max_tokens": 900, "stream": number % 3 > 0, "ignore_eos": True, "n": 2}
        abort_after(server, body, num_bytes=64 if number % 3 == 2 else 0)


def test_aborted_requests_leave_nothing(server: Running) -> None:
    abort_many(server, 10)
    server.assert_idle()
    memory = psutil.Process().memory_info().rss
    aborted = server.engine.metrics.finished["abort"]
    abort_many(server, 60)
    server.assert_idle()
    assert server.engine.metrics.finished["abort"] > aborted
    assert psutil.Process().memory_info().rss < memory + 2**25
    assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_reader_who_stops_reading_holds_up_nobody(server: Running) -> None:
    """Its answer is computed to the end, and kept in one place only."""
    body = json.dumps({"prompt": "Once", "max_tokens": 300, "stream": True, "ignore_eos": True}).encode()
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 4}).status_code == 200
        server.assert_idle()


def test_who_never_reads_is_cut_off(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps a connection full for good keeps a place of the server's."""
    monkeypatch.setattr(Patient, "unread_seconds", 1.0)
    page = len(server.get("/openapi.json").content)
    asked = 2**24 // page
    wait_for(lambda: server.connections == 0)
    with server.connect() as connection:
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\n\r\n" * asked)
        said = connection.recv(1)  # so that the server is at it; and no more
        wait_for(lambda: server.connections == 0)
        said += closed_within(connection, 20)
    assert said.startswith(b"HTTP/1.1 200 OK")
    assert len(said) < asked * page, "all was read, so that there was no reason to cut it off"


# ------------------------------------------------------------------------------------------------------ limits and keys


def test_more_than_can_wait_is_too_many() -> None:
    with running({"max_num_seqs": 1}, max_waiting=1) as server, slowed(server.engine):
        url, body = server.url + COMPLETIONS, {"prompt": "x", "max_tokens": 900, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", url, json=body, timeout=PATIENCE) as first:
            assert first.status_code == 200
            with httpx.stream("POST", url, json=body, timeout=PATIENCE) as second:
                assert second.status_code == 200
                third = server.post(COMPLETIONS, body)
                assert error_of(third, 429)["type"] == "rate_limit_error"
                assert int(third.headers["retry-after"]) >= 1
        server.assert_idle()
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_files_are_left_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is raised as far as it may be, and connections get half of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    assert room_for_connections() == 2048
    assert changed == [(4096, 4096)]
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    with monkeypatch.context() as patch:
        patch.setattr("flexmoe.server.run.room_for_connections", lambda: 4)
        with running(receive_seconds=600.0) as server:  # so that nobody is shown the door for being slow
            seated = [server.connect() for _ in range(4)]
            wait_for(lambda: server.connections == 4)
            for _ in range(3):
                with server.connect() as late:
                    assert closed_within(late, 20) == b""
            for connection in seated:
                connection.close()
            wait_for(lambda: server.connections == 0)
            assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_keys_and_origins() -> None:
    with running(api_keys=("first-key", "second-key"), cors_origins=("https://good.example",)) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}, {"Authorization": "é"}):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            error = error_of(server.get("/v1/models", headers=encoded), 401)
            assert error["type"] == "authentication_error"
        for path in ("/metrics", "/openapi.json", "/docs", "/v1/flexmoe/events", "/nothing"):
            error_of(server.get(path), 401)
        error_of(server.post("/generate/", {"prompt": "x"}), 401)
        for key in ("first-key", "second-key"):
            assert server.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/health/live", "/health/ready"):
            assert server.get(path).status_code == 200
        asked = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
        assert httpx.options(server.url + CHAT, headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
        refused = httpx.options(server.url + CHAT, headers={**asked, "Origin": "https://bad.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_no_origin_is_let_in_unless_asked(server: Running) -> None:
    found = server.get("/v1/models", headers={"Origin": "https://good.example"})
    assert not [name for name in found.headers if name.startswith("access-control")]


def test_listeners_are_limited_and_forgotten(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        url = server.url + "/v1/flexmoe/events?interval=60"
        for _ in range(32):
            assert stack.enter_context(httpx.stream("GET", url, timeout=PATIENCE)).status_code == 200
        error_of(server.get("/v1/flexmoe/events?count=1"), 429)
    wait_for(lambda: server.get("/v1/flexmoe/events?count=1").status_code == 200)
