"""How servers end: a drain, a second signal, a dead engine, a dead worker; and how they refuse to start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from flexmoe.config.engine import LaunchConfig
from flexmoe.errors import EngineError
from tests.server.serving import PATIENCE, Process, process, running, slowed, slowed_process, wait_for

LONG: dict[str, Any] = {"prompt": "Once", "max_tokens": 900, "stream": True, "ignore_eos": True}
PLAIN: dict[str, Any] = {**LONG, "stream": False}


class Client(threading.Thread):
    """Asks once and keeps what comes; `begun` is set with the first piece."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__()
        self._url, self._body = url + "/v1/completions", body
        self.begun = threading.Event()
        self.status, self.text, self.failure = 0, "", ""
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=PATIENCE) as response:
                self.status = response.status_code
                for piece in response.iter_text():
                    self.text += piece
                    self.begun.set()
        except httpx.HTTPError as error:
            self.failure = repr(error)

    @property
    def events(self) -> list[str]:
        return [line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: ")]


def clients_of(server: Process | Any, count: int) -> list[Client]:
    """Streams that have begun, and one that waits for a whole answer."""
    clients = [Client(server.url, LONG) for _ in range(count)]
    for client in clients:
        assert client.begun.wait(PATIENCE)
    clients.append(Client(server.url, PLAIN))
    wait_for(lambda: f"running {count + 1}" in figures(server.url))
    return clients


def test_a_drain_lets_requests_finish_and_ends_with_0(tmp_path: Path) -> None:
    with slowed_process(tmp_path / "hurry", "--drain-seconds", "60") as server:
        clients = clients_of(server, 3)
        server.signal(signal.SIGTERM)
        (tmp_path / "hurry").touch()
        assert server.wait() == 0
        for client in clients:
            client.join(PATIENCE)
            assert (client.status, client.failure) == (200, "")
        for client in clients[:3]:
            assert client.events[-1] == "[DONE]"
            assert '"finish_reason":"length"' in client.events[-2]
        assert json.loads(clients[3].text)["usage"]["completion_tokens"] == 900
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")
        assert any('"draining"' in line for line in server.lines)


def figures(url: str) -> str:
    """running N."""
    lines = httpx.get(url + "/metrics", timeout=PATIENCE).text.splitlines()
    running = next(line for line in lines if line.startswith("flexmoe_requests_running{"))
    return f"running {float(running.split()[-1]):g}"


def test_what_does_not_finish_in_time_gets_an_error_and_the_status_is_0(tmp_path: Path) -> None:
    with slowed_process(tmp_path / "hurry", "--drain-seconds", "0.2") as server:
        clients = clients_of(server, 2)
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        for client in clients:
            client.join(PATIENCE)
        for client in clients[:2]:
            assert client.events[-1] == "[DONE]"
            assert "was not finished in time" in json.loads(client.events[-2])["error"]["message"]
        assert clients[2].status == 503
        assert json.loads(clients[2].text)["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(number: int, tmp_path: Path) -> None:
    with slowed_process(tmp_path / "hurry", "--drain-seconds", "600") as server:
        clients = clients_of(server, 2)
        server.signal(number)
        wait_for(lambda: any('"draining"' in line for line in server.lines))
        server.signal(number)
        assert server.wait() == 128 + number
        for client in clients:
            client.join(PATIENCE)


def test_a_dead_engine_is_told_to_all_and_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        with slowed(server.engine):
            clients = clients_of(server, 3)

        def die(*_: Any) -> None:
            raise RuntimeError("the device is lost")

        monkeypatch.setattr(server.engine, "step", die)
        for client in clients:
            client.join(PATIENCE)
        for client in clients[:3]:
            error = json.loads(client.events[-2])["error"]
            assert (error["type"], error["code"]) == ("server_error", "engine_dead")
            assert "the device is lost" not in client.text
        assert clients[3].status == 503
        assert server.service.status == "dead"
    assert "Traceback" not in "".join(client.text for client in clients)


def test_while_dead_everything_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the death and the end, which a slow client may delay."""
    with running() as server:
        monkeypatch.setattr(server.service.engine, "_on_death", None)
        monkeypatch.setattr(server.engine, "step", lambda: 1 / 0)
        assert server.post("/v1/completions", PLAIN).status_code == 503
        assert server.post("/v1/completions", PLAIN).status_code == 503
        assert server.get("/health").status_code == server.get("/health/ready").status_code == 503
        assert server.get("/health").json() == {"status": "dead"}
        assert "flexmoe_engine_up{" in server.get("/metrics").text


def test_a_step_that_hangs_is_told_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(step_seconds=0.5) as server:
        begun, blocked, step = threading.Event(), threading.Event(), server.engine.step

        def hang(**options: Any) -> Any:
            begun.set()
            blocked.wait(PATIENCE)
            return step(**options)

        monkeypatch.setattr(server.engine, "step", hang)
        clients = [Client(server.url, LONG)]
        assert begun.wait(PATIENCE)
        clients.append(Client(server.url, PLAIN))  # which is not even queued: the engine's thread does not answer
        for client in clients:
            client.join(PATIENCE)
            assert "the engine hangs: a step has been running for" in client.text
        assert clients[0].events[-1] == "[DONE]"
        assert clients[1].status == 503
        for path in ("/health", "/health/live", "/health/ready"):
            answer = server.get(path)
            assert answer.status_code == 503
            assert answer.json()["status"] == "hung"
            assert "longer than step_seconds=0.5" in answer.json()["reason"]
        assert server.post("/v1/completions", PLAIN).status_code == 503
        metrics = server.get("/metrics").text
        assert 'flexmoe_engine_up{model="builtin"} 0.0' in metrics
        assert float(metrics.split('flexmoe_step_running_seconds{model="builtin"} ')[1].split()[0]) > 0.5
        blocked.set()
        wait_for(lambda: server.get("/health").json() == {"status": "ok"})
        server.assert_idle()
        monkeypatch.setattr(server.service.engine, "_most_seconds", PATIENCE)  # a busy machine is slow without hanging
        assert server.post("/v1/completions", {**PLAIN, "max_tokens": 4}).status_code == 200


HUNG = """
import sys, time
from flexmoe.engine.engine import Engine
from flexmoe.cli.main import main
Engine.step = lambda *_, **__: time.sleep(1000)
sys.argv[0] = "flexmoe"
main()
"""


def test_a_server_does_not_wait_for_a_step_that_hangs() -> None:
    with process("--step-seconds", "0.5", "--drain-seconds", "600", program=("-c", HUNG)) as server:
        client = Client(server.url, PLAIN)
        client.join(PATIENCE)
        assert client.status == 503
        server.signal(signal.SIGTERM)
        assert server.wait() == 1
        assert any('"engine": "hung"' in line for line in server.lines)


def test_a_dead_worker_is_told_long_before_it_would_count_as_hung_and_the_status_is_1(tmp_path: Path) -> None:
    with slowed_process(tmp_path / "hurry", "--tensor-parallel-size", "2") as server:
        clients = clients_of(server, 3)
        workers = psutil.Process(server.process.pid).children()
        assert len(workers) == 2
        start = time.monotonic()
        os.kill(workers[1].pid, signal.SIGKILL)
        for client in clients:
            client.join(PATIENCE)
        assert time.monotonic() - start < LaunchConfig().worker_timeout / 2
        for client in clients[:3]:
            assert json.loads(client.events[-2])["error"]["code"] == "engine_dead"
        assert clients[3].status == 503
        assert server.wait() == 1
        assert any("died with exit code -9 (SIGKILL)" in line for line in server.lines)
        assert not [worker for worker in workers if worker.is_running()]


def test_an_idle_server_notices_a_dead_worker() -> None:
    with process("--tensor-parallel-size", "2") as server:
        os.kill(psutil.Process(server.process.pid).children()[-1].pid, signal.SIGKILL)
        assert server.wait() == 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flexmoe", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded() -> None:
    with running() as server:
        result = run("--port", str(server.port))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"port={server.port}: the address cannot be had" in result.stderr


def test_keys_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team's\nteam-key  # until May\n\nother-key\n", encoding="utf-8")
    with process("--api-key-file", str(file), "--api-key", "third", "--host", "127.0.0.1") as server:
        for key, status in (("team-key", 200), ("other-key", 200), ("third", 200), ("#", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(server.url + "/v1/models", headers=headers, timeout=PATIENCE).status_code == status
        assert any("3 API keys" in line for line in server.lines)
        assert not any("team-key" in line for line in server.lines)
    file.write_text("# none\n", encoding="utf-8")
    assert "holds no key" in run("--api-key-file", str(file)).stderr


def test_the_summary_and_the_log() -> None:
    with process("--served-model-name", "tales", "--log-prompts") as server:
        url = server.url + "/v1/completions"
        body = {"model": "tales", "prompt": "Once\nupon", "max_tokens": 2}
        answer = httpx.post(url, json=body, headers={"X-Request-Id": "mine-1"}, timeout=PATIENCE)
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["model"] == "tales"
        forged = httpx.post(url, json=body, headers={"X-Request-Id": 'a"b\\'}, timeout=PATIENCE)
        assert forged.headers["x-request-id"] != 'a"b\\'
        wait_for(lambda: sum('"request"' in line for line in server.lines) == 2)
        line = json.loads(next(line for line in server.lines if '"mine-1"' in line))
        assert line["status"] == 200
        assert line["output_tokens"] == 2
        assert line["prompts"] == ["Once\nupon"]
        summary = "\n".join(server.lines)
        for told in (
            "MixtralForCausalLM",
            "KV cache",
            "decode:",
            "at once",
            "no API keys",
            "model name: tales",
            server.url,
        ):
            assert told in summary
    with process() as server:
        httpx.post(server.url + "/v1/completions", json={"prompt": "secret words", "max_tokens": 1}, timeout=PATIENCE)
        wait_for(lambda: any('"request"' in line for line in server.lines))
        assert "secret" not in "\n".join(server.lines)


def test_the_first_signal_after_a_death_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends the server meanwhile shall not cut off what its clients are told."""
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    with running() as server:
        server.server._on_death(EngineError("a rank died"))
        server.server.handle_exit(signal.SIGTERM, None)
        assert ends == []
        server.server.handle_exit(signal.SIGTERM, None)
        assert ends == [128 + signal.SIGTERM]
