"""What the web page asks beside OpenAI's API: about, routing, routing of tokens, another engine at a URL."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from flexmoe.config.routing import read_recording
from flexmoe.errors import ConfigError
from flexmoe.server.about import _kernels
from flexmoe.server.endpoint import THREAD, Endpoint
from tests.server.serving import PATIENCE, Running, wait_for

QUESTION = [{"role": "user", "content": "What is the capital of Norway?"}]
ANSWER = "The capital of Norway is Oslo."


def test_about(server: Running) -> None:
    about = server.get("/v1/flexmoe/about").json()
    assert about["experts"] == {"layers": list(range(6)), "num_experts": 8, "top_k": 2, "placements": None}
    assert about["compare"] is None
    assert about["engine"]["max_model_len"] == 1024
    assert len(about["kernels"]) == 4
    for name, bounds in about["latency_bounds"].items():
        assert bounds == sorted(bounds), name


@pytest.mark.parametrize(
    ("decode", "prompts", "told"),
    [
        ("C (avx2)", "torch", ["C (avx2)", "torch", "torch", "cpu"]),
        ("C (avx512bf16)", "C (avx512bf16)", ["C (avx512bf16)"] * 4),
        ("Triton", "Triton", ["Triton", "Triton", "torch", "Triton"]),
        ("torch (no compiler)", "torch", ["torch (no compiler)", "torch", "torch", "cpu"]),
    ],
)
def test_kernels_are_told_by_operation(decode: str, prompts: str, told: list[str]) -> None:
    about = {"decode_kernels": decode, "prompt_kernels": prompts, "expert_backend": "cpu"}
    assert list(_kernels(about).values()) == told


def test_the_recording_is_one(server: Running, tmp_path: Path) -> None:
    server.post("/v1/completions", {"prompt": "Once", "max_tokens": 4})
    file = tmp_path / "routing.jsonl"
    text = server.get("/v1/flexmoe/routing").text
    file.write_text(text, encoding="utf-8")
    if text:  # nothing was looked at yet otherwise
        assert {load.layer for load in read_recording(file)} == set(range(6))


def test_routing_of_tokens_whole_and_in_pieces(server: Running) -> None:
    body: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "return_routing": True}
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    whole = choice["routing"]
    assert whole["layers"] == list(range(6))
    assert "".join(token["token"] for token in whole["tokens"]).startswith(ANSWER)
    for token in whole["tokens"]:
        assert [len(experts) for experts in token["experts"]] == [2] * 6
        assert [sum(weights) for weights in token["weights"]] == pytest.approx([1] * 6, abs=1e-3)
    pieces = [
        piece
        for chunk in _events(server, "/v1/chat/completions", {**body, "stream": True})
        for piece in chunk["choices"][0].get("routing", {"tokens": []})["tokens"]
    ]
    assert pieces == whole["tokens"]
    assert "routing" not in server.post("/v1/chat/completions", {**body, "return_routing": False}).json()["choices"][0]


def test_times_stand_beside_the_usage(server: Running) -> None:
    body = {"messages": QUESTION, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    last = list(_events(server, "/v1/chat/completions", body))[-1]
    assert last["usage"]["completion_tokens"] > 5
    assert 0 < last["timings"]["ttft"] < PATIENCE
    assert 0 < last["timings"]["tpot"] < PATIENCE


def test_another_endpoint_answers_through_this_server(server: Running) -> None:
    refused = server.post("/v1/flexmoe/compare", {"messages": QUESTION})
    assert refused.status_code == 404
    assert "--compare" in refused.json()["error"]["message"]
    server.service.compare = Endpoint(server.api, None)  # itself
    try:
        assert server.get("/v1/flexmoe/about").json()["compare"] == {"kind": "url", "name": server.api[7:]}
        events = list(_events(server, "/v1/flexmoe/compare", {"messages": QUESTION, "max_tokens": 20}))
        assert events[0] == {"state": "ready"}
        pieces = [event["choices"][0]["delta"].get("content", "") for event in events if event.get("choices")]
        assert "".join(pieces) == ANSWER
        assert events[-1]["usage"]["completion_tokens"] > 5
        assert events[-1]["timings"]["tpot"] > 0
    finally:
        server.service.compare = None


def test_an_endpoint_that_is_not_there_is_told(server: Running) -> None:
    server.service.compare = Endpoint("http://127.0.0.1:9/v1", None)
    try:
        (event,) = _events(server, "/v1/flexmoe/compare", {"messages": QUESTION})
        assert event["error"]["code"] == "rival_failed"
        assert event["error"]["message"].startswith("127.0.0.1:9 failed:")
    finally:
        server.service.compare = None


@pytest.fixture
def silent(server: Running) -> Iterator[None]:
    """Another endpoint that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        server.service.compare = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", None)
        try:
            yield
        finally:
            server.service.compare = None


@pytest.mark.usefixtures("silent")
def test_so_many_questions_are_passed_on_and_end_with_who_asked(server: Running) -> None:
    url, body = server.url + "/v1/flexmoe/compare", {"messages": QUESTION}
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            assert stack.enter_context(httpx.stream("POST", url, json=body, timeout=PATIENCE)).status_code == 200
        wait_for(lambda: _threads() == 8)
        refused = server.post("/v1/flexmoe/compare", body)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_questions"
    wait_for(lambda: not _threads(), 10)


def _threads() -> int:
    return sum(thread.name == THREAD for thread in threading.enumerate())


@pytest.mark.parametrize("url", ["ftp://host/v1", "hf2", "http://", "http://host/v1?x=1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="neither hf nor a URL"):
        Endpoint(url, None)


def test_figures_leave_out_experts_that_did_not_change(server: Running) -> None:
    events = list(_events(server, "/v1/flexmoe/events?interval=0.02&count=5&changes=true", None))
    assert "experts" in events[0]
    assert [event for event in events[1:] if "experts" in event] == []
    assert any("latency" not in event for event in events)
    assert all(event["requests"] == {"running": 0, "waiting": 0} for event in events)
    assert events[0]["memory"]["resident_bytes"] > 1e6
    assert (
        len(events[0]["latency"]["ttft"]) == len(server.get("/v1/flexmoe/about").json()["latency_bounds"]["ttft"]) + 1
    )


def test_nobody_gets_more_than_64_figures_a_second(server: Running) -> None:
    assert server.get("/v1/flexmoe/events?interval=0.01&count=1").status_code == 400


def _events(server: Running, path: str, body: Any) -> Iterator[Any]:
    method = "GET" if body is None else "POST"
    with httpx.stream(method, server.url + path, json=body, timeout=PATIENCE) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))
