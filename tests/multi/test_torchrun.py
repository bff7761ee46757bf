"""Under torchrun: the first process drives, the others serve; nothing of the script after LLM() runs twice."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest

from flexmoe import LLM, SamplingParams
from flexmoe.parallel import launch, network
from flexmoe.parallel.child import SAFE_ENVIRONMENT
from flexmoe.parallel.mesh import TCPStore
from flexmoe.parallel.rank import Setup
from tests.cpu.tiny_models import tiny

ROOT = Path(__file__).parents[2]
SCRIPT = """
import gc, sys
from flexmoe import LLM, SamplingParams
OPTIONS = dict(dtype="float32", device="cpu", threads=1, max_model_len=64, num_blocks=40)
with LLM(sys.argv[1], tensor_parallel_size=2, expert_parallel_size=2, **OPTIONS) as llm:
    print("first", *llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].token_ids)
    assert gc.get_freeze_count() == 0, "what a user's process collects is the user's to decide"
print("end")
"""


ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def command(tmp_path: Path, *options: str) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return [*TORCHRUN, *options, str(script), str(tiny("mixtral"))]


def torchrun(tmp_path: Path, processes: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tmp_path, "--standalone", f"--nproc-per-node={processes}"),
        cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def expected() -> list[str]:
    """What the script prints, line by line."""
    with LLM(tiny("mixtral"), dtype="float32", threads=1, max_model_len=64, num_blocks=40) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        return [f"first {' '.join(map(str, llm.generate([5, 6, 7], params)[0].token_ids))}", "end"]


def test_a_script_under_torchrun(tmp_path: Path) -> None:
    result = torchrun(tmp_path, 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == expected()


def rendezvous(kind: str, node: int, port: int) -> list[str]:
    """How two agents find each other: both ways that torchrun knows."""
    if kind == "c10d":
        return ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1", "--local-addr=127.0.0.1"]
    return [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]


def free_port() -> int:
    """Below those that systems give to whoever asks for any: nobody else is given it before it is used."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_two_agents_as_on_two_machines(tmp_path: Path, kind: str) -> None:
    """The process of rank 0 drives, wherever it is; the other serves."""
    port = free_port()
    agents = [
        subprocess.Popen(
            command(tmp_path, "--nnodes=2", "--nproc-per-node=1", *rendezvous(kind, node, port)),
            cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=180) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    outputs = [out.splitlines() for out, _ in said]
    assert sorted(outputs) == [[], expected()]
    assert kind == "c10d" or outputs[1] == []


def test_another_number_of_processes_than_ranks(tmp_path: Path) -> None:
    result = torchrun(tmp_path, 3)
    assert result.returncode != 0
    assert "torchrun started 3 processes, but the plan has 2 ranks" in result.stderr


def test_strangers_that_find_the_port_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first process, while it waits for the others: scanners, of which one stays, and one with another key."""
    monkeypatch.setattr(network, "KEY_SECONDS", 1.0)
    for name in SAFE_ENVIRONMENT:
        monkeypatch.setenv(name, "as it was")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    setup = Setup(0, 2, 0, 2, "127.0.0.1", store.port, 5.0)
    found: list[launch.Launched] = []
    thread = threading.Thread(target=lambda: found.append(launch.gather(setup, Silent)))
    thread.start()
    host, port, key = store.get("flexmoe/control").decode().split()
    socket.create_connection((host, int(port))).close()
    with pytest.raises(AuthenticationError):
        Client((host, int(port)), authkey=b"another")
    with (
        socket.create_connection((host, int(port))),
        Client((host, int(port)), authkey=bytes.fromhex(key)) as other,
    ):
        other.send(1)
        thread.join(60)
        assert [member.rank for member in found[0].members] == [0, 1]
        found[0].release()


class Silent:
    """A rank that has nothing to do."""

    def __init__(self, setup: Setup, beats: Any) -> None:
        del setup, beats

    def handle(self, command: str, payload: Any) -> Any:
        del command, payload

    def close(self) -> None:
        pass
