"""Processes that compile an engine's kernels ahead: what they compile, that they remember it, and that they end."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F

from flexmoe.engine import compile_ahead
from flexmoe.engine.compile_ahead import CompilingAhead
from flexmoe.engine.compile_worker import Job, WithoutProducts
from flexmoe.models.presets import PRESETS

_SLICES = 24  # of all kernels one is compiled here


def job(rows: int = 4) -> Job:
    config = dict(PRESETS["olmoe-1b-7b"].hf_config) | {"num_hidden_layers": 3, "vocab_size": 1024}
    return Job(
        hf_config=config, dtype="bfloat16", gpu="NVIDIA H200", capability=(9, 0), shared=227 * 1024, block_size=16,
        max_position=256, rows=rows, tokens=64,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Triton and of ours, empty; workers compile, whatever this process does."""
    (tmp_path / "triton").mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that do nothing until they are told to end."""
    script = "import sys; sys.stdin.read()"

    def worker(line: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True)

    monkeypatch.setattr(compile_ahead, "_worker", worker)


def work(done: Path) -> None:
    """As the first of many workers."""
    worker = compile_ahead._worker(job().line(0, _SLICES, done))
    assert worker.stdin is not None
    with worker.stdin:
        assert worker.wait(timeout=240) == 0


def test_a_worker_compiles_its_share_once(tmp_path: Path) -> None:
    done = tmp_path / "triton" / "folder" / "done"
    work(done)
    assert done.exists()
    assert 1 <= len(list((tmp_path / "triton").rglob("*.cubin"))) <= 20
    files = sorted((tmp_path / "triton").rglob("*"))
    work(done)
    assert sorted((tmp_path / "triton").rglob("*")) == files


def test_a_worker_ends_with_its_engine() -> None:
    worker = compile_ahead._worker(job().line(0, 1, None))
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(timeout=240) == 0


def remember(work: Job) -> None:
    """As two workers do that are through."""
    for path in compile_ahead._done(work, 2):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.usefixtures("asleep")
def test_workers_are_ended_with_the_engine_and_not_started_again_once_they_were_through() -> None:
    compiling = CompilingAhead(job(), workers=2)
    at_work = list(compiling._workers)
    assert [worker.poll() for worker in at_work] == [None, None]
    compiling.close()
    assert all(worker.poll() is not None for worker in at_work)
    remember(job())
    assert CompilingAhead(job(), workers=2)._workers == []
    other = CompilingAhead(job(rows=8), workers=2)
    assert len(other._workers) == 2
    other.close()


@pytest.mark.usefixtures("asleep")
def test_who_clears_triton_s_cache_has_kernels_compiled_anew(tmp_path: Path) -> None:
    remember(job())
    assert CompilingAhead(job(), workers=2)._workers == []
    shutil.rmtree(tmp_path / "triton")
    (tmp_path / "triton").mkdir()  # by whoever compiles next
    compiling = CompilingAhead(job(), workers=2)
    assert len(compiling._workers) == 2
    compiling.close()


@pytest.mark.usefixtures("asleep")
def test_a_worker_that_is_through_leaves_no_zombie() -> None:
    compiling = CompilingAhead(job(), workers=2)
    first, second = (psutil.Process(worker.pid) for worker in compiling._workers)
    last = compiling._workers[1].stdin
    assert last is not None
    last.close()
    for _ in range(6000):
        if not second.is_running():
            break
        time.sleep(0.01)
    assert not psutil.pid_exists(second.pid)
    assert first.is_running()
    compiling.close()
    assert not psutil.pid_exists(first.pid)


def test_engines_without_a_gpu_compile_nothing() -> None:
    from flexmoe import LLM

    with LLM(device="cpu", dtype="float32") as llm:
        assert llm.engine._compiling._workers == []


def test_products_are_left_out_into_whatever_they_go() -> None:
    """On a CPU those of a prompt of a large model would take minutes."""
    out = torch.full((2, 3), 7.0)
    with WithoutProducts():
        assert F.linear(torch.ones(2, 4), torch.ones(3, 4)).shape == (2, 3)
        torch.mm(torch.ones(2, 4), torch.ones(4, 3), out=out)
    assert (out == 7.0).all()
