"""Ranks that die or hang in every phase: soon an error that names the rank, and nothing is left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from flexmoe import LLM, EngineError, SamplingParams
from flexmoe.config.engine import LaunchConfig
from flexmoe.engine import launchers, ranks
from flexmoe.errors import ConfigError, RankError
from flexmoe.parallel import rank
from tests.cpu.tiny_models import tiny

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "threads": 1, "max_model_len": 64, "num_blocks": 40, "tensor_parallel_size": 2,
}  # fmt: skip
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9]]
LIMIT = LaunchConfig().worker_timeout / 2  # seconds from a death to the error: it was seen, and not only missed


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files of ranks go here, where no other test makes any."""
    tiny("mixtral")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Nothing:
    """What a start leaves behind: the children and open ports of before, temporary files."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> tuple[set[int], set[int], set[str]]:
        me = psutil.Process()
        children = {child.pid for child in me.children(recursive=True)}
        ports = {c.laddr.port for c in me.net_connections() if c.status == psutil.CONN_LISTEN}
        return children, ports, {path.name for path in Path(tempfile.gettempdir()).iterdir()}

    def is_left(self) -> bool:
        return all(now <= before for now, before in zip(self._now(), self._before, strict=True))


def make(monkeypatch: pytest.MonkeyPatch, fate: str, **options: Any) -> LLM:
    monkeypatch.setattr(ranks, "_MODULE", "tests.multi.dying")
    monkeypatch.setenv("FLEXMOE_TEST_FATE", fate)
    return LLM(tiny("mixtral"), **{**OPTIONS, **options})


def interrupted(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def soon() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < LIMIT


CODES = {"kill": "exit code -9 (SIGKILL)", "exit": "exit code 3", "abort": "exit code -6 (SIGABRT)"}


@pytest.mark.parametrize(
    ("fate", "doing"),
    [
        ("prefill 1 kill", "computing a step"),
        ("prefill 0 exit", "computing a step"),
        ("decode 0 kill", "computing a step"),
        ("decode 1 abort", "computing a step"),
    ],
)
def test_a_death_in_a_step(monkeypatch: pytest.MonkeyPatch, fate: str, doing: str) -> None:
    nothing = Nothing()
    _, rank, how = fate.split()
    llm = make(monkeypatch, fate)
    with soon(), pytest.raises(RankError) as caught:
        llm.generate(PROMPTS, PARAMS)
    said = f"rank {rank} of 2 (tp {rank}, etp {rank}) died with {CODES[how]} while {doing}; its log ends: "
    assert str(caught.value).startswith(said)
    assert "these are the last words" in str(caught.value)
    assert caught.value.rank == int(rank)
    assert nothing.is_left()
    with soon(), pytest.raises(RankError, match=f"rank {rank} of 2 .* died"):  # it stays over, and says why
        llm.generate(PROMPTS, PARAMS)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate(PROMPTS)


def test_a_death_of_one_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three that lose their connection to it do not take the blame."""
    nothing = Nothing()
    llm = make(monkeypatch, "decode 2 kill", tensor_parallel_size=4, expert_parallel_size=2)
    with soon(), pytest.raises(RankError, match=r"rank 2 of 4 \(tp 2, ep 1, etp 0\) died with exit code -9"):
        llm.generate(PROMPTS, PARAMS)
    llm.close()
    assert nothing.is_left()


@pytest.mark.parametrize(
    ("rank", "how", "what"), [(1, "kill", "died with"), (0, "sleep", "hangs"), (1, "sleep", "hangs")]
)
def test_a_stage_that_ends(monkeypatch: pytest.MonkeyPatch, rank: int, how: str, what: str) -> None:
    """The stages before and behind it wait for it, and have begun more or fewer collectives than it."""
    nothing = Nothing()
    one = {"tensor_parallel_size": 1, "pipeline_parallel_size": 2, "worker_timeout": 2.0}
    llm = make(monkeypatch, f"decode {rank} {how}", **one)
    with soon(), pytest.raises(RankError, match=rf"rank {rank} of 2 \(pp {rank}\) {what}"):
        llm.generate(PROMPTS, PARAMS)
    llm.close()
    assert nothing.is_left()


@pytest.mark.parametrize(("how", "what"), [("kill", "died with"), ("sleep", "hangs")])
def test_an_idle_data_rank_that_ends(monkeypatch: pytest.MonkeyPatch, how: str, what: str) -> None:
    """It has no request, and the other waits for it at its experts."""
    nothing = Nothing()
    shared = {"tensor_parallel_size": 1, "data_parallel_size": 2, "expert_parallel_size": 2, "worker_timeout": 2.0}
    llm = make(monkeypatch, f"decode 1 {how}", **shared)
    with soon(), pytest.raises(RankError, match=rf"rank 1 of 2 \(dp 1, ep 1\) {what}"):
        llm.generate(PROMPTS[0], PARAMS)
    llm.close()
    assert nothing.is_left()


def test_an_error_in_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Nothing()
    llm = make(monkeypatch, "decode 1 raise")
    with soon(), pytest.raises(RankError, match=r"rank 1 of 2 .* failed with MemoryError: no more while computing"):
        llm.generate(PROMPTS, PARAMS)
    llm.close()
    assert nothing.is_left()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_purpose_in_a_step_ends_the_ranks(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """The other one waits for this one's part of a sum, and would take its first part of the next step for it."""
    nothing = Nothing()
    llm = make(monkeypatch, f"decode {rank} refuse")
    with soon(), pytest.raises(RankError, match=rf"rank {rank} of 2 .* failed with RuntimeError: the memory of device"):
        llm.generate(PROMPTS, PARAMS)
    assert nothing.is_left()
    llm.close()


@pytest.mark.parametrize(("how", "words"), [("kill", "last words"), ("raise", "MemoryError: no more")])
def test_a_death_while_loading(monkeypatch: pytest.MonkeyPatch, how: str, words: str) -> None:
    nothing = Nothing()
    with pytest.raises(RankError, match=f"rank 1 of 2 .* while loading the model; its log ends: .*{words}"):
        make(monkeypatch, f"load 1 {how}")
    assert nothing.is_left()


def test_a_death_of_an_idle_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Nothing()
    with LLM(tiny("mixtral"), **OPTIONS) as llm:
        runner = llm.engine.runner
        assert isinstance(runner, ranks.RankedRunner)
        process = runner.ranks.members[1].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        with soon(), pytest.raises(RankError, match=r"rank 1 of 2 .* died with exit code -9"):
            llm.generate(PROMPTS * 20, PARAMS)
    assert nothing.is_left()


@pytest.mark.parametrize(("how", "words"), [("kill", "died with exit code -9"), ("stop", "hangs: it has not ended in")])
def test_a_death_or_a_hang_while_closing(monkeypatch: pytest.MonkeyPatch, how: str, words: str) -> None:
    nothing = Nothing()
    llm = make(monkeypatch, f"close 1 {how}")
    llm.generate(PROMPTS, PARAMS)
    with soon(), pytest.raises(RankError) as caught:
        llm.close()
    assert f"rank 1 of 2 (tp 1, etp 1) {words}" in str(caught.value)
    assert "while closing" in str(caught.value)
    assert nothing.is_left()
    llm.close()


def test_ctrl_c_while_ranks_close_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Nothing()
    llm = make(monkeypatch, "close 1 stop")
    llm.generate(PROMPTS, PARAMS)
    timer = threading.Timer(1.0, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    llm.close()
    assert nothing.is_left()


def test_ctrl_c_while_ranks_are_killed_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever presses it twice meets this: the first one closes the engine."""
    nothing = Nothing()
    llm = LLM(tiny("mixtral"), **OPTIONS)
    runner = llm.engine.runner
    assert isinstance(runner, ranks.RankedRunner)
    with monkeypatch.context() as patch:
        patch.setattr(type(runner.ranks.members[0]), "kill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.ranks.kill()
    llm.close()
    assert nothing.is_left()


def test_a_death_is_told_though_what_was_taken_cannot_be_given_back(caplog: pytest.LogCaptureFixture) -> None:
    """As where the cluster that placed the ranks is gone with one of them."""

    def fail() -> NoReturn:
        raise ConnectionError("the cluster is gone")

    nothing = Nothing()
    llm = LLM(tiny("mixtral"), **OPTIONS)
    runner = llm.engine.runner
    assert isinstance(runner, ranks.RankedRunner)
    runner.ranks._launched.after = fail
    process = runner.ranks.members[1].process
    assert process is not None
    process.kill()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(llm.generate, PROMPTS, PARAMS)
        with pytest.raises(RankError, match="rank 1 of 2"):
            answer.result(LIMIT)
    llm.close()
    assert "the cluster is gone" in caplog.text
    assert nothing.is_left()


def test_a_rank_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dead before it is watched, or told anything; what is refused outright leaves no file open either."""
    nothing = Nothing()
    for _ in range(3):
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(RankError, match=r"rank [01] of 2 .* died with exit code 1 while (starting|loading)"):
            LLM(tiny("mixtral"), **OPTIONS)
        files = psutil.Process().num_fds()
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(FileNotFoundError):
            LLM(tiny("mixtral"), **OPTIONS)
        assert psutil.Process().num_fds() <= files
    assert nothing.is_left()


@pytest.mark.parametrize("fate", ["prefill 0 stop", "decode 1 stop", "load 1 stop"])
def test_a_hang(monkeypatch: pytest.MonkeyPatch, fate: str) -> None:
    nothing = Nothing()
    phase, rank, _ = fate.split()
    words = f"rank {rank} of 2 .* hangs: no sign of work for 2 s while {'load' if phase == 'load' else 'comput'}ing"
    if phase == "load":
        with pytest.raises(RankError, match=words):
            make(monkeypatch, fate, worker_timeout=2.0)
    else:
        llm = make(monkeypatch, fate, worker_timeout=2.0)
        with soon(), pytest.raises(RankError, match=words) as caught:
            llm.generate(PROMPTS, PARAMS)
        assert caught.value.exit_code is None
        llm.close()
    assert nothing.is_left()


def test_a_refusal_of_the_ranks_is_that_of_one_process() -> None:
    nothing = Nothing()
    with pytest.raises(ConfigError, match="threads=1000 is above the"):
        LLM(tiny("mixtral"), **{**OPTIONS, "threads": 1000})
    assert nothing.is_left()


def test_wrong_plans_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers.launch, "spawn", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(ConfigError, match="tensor_parallel_size=3 does not fit 4 heads"):
        LLM(tiny("mixtral"), **{**OPTIONS, "tensor_parallel_size": 3})


def test_an_engine_that_nobody_closes_leaves_nothing() -> None:
    nothing = Nothing()
    llm = LLM(tiny("mixtral"), **OPTIONS)
    llm.generate(PROMPTS, PARAMS)
    del llm
    assert nothing.is_left()


SCRIPT = """
import os, signal, sys, threading
from flexmoe import LLM, SamplingParams
OPTIONS = dict(dtype="float32", device="cpu", threads=1, max_model_len=64, num_blocks=40)
llm = LLM(sys.argv[1], tensor_parallel_size=2, **OPTIONS)
print(*[member.process.pid for member in llm.engine.runner.ranks.members], flush=True)
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
first = llm.generate([5, 6, 7], PARAMS)[0].token_ids
what = sys.argv[2]
if what == "interrupt":
    main = threading.main_thread().ident
    for delay in (0.002, 0.004, 0.006, 0.01, 0.02):
        timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            while True:
                llm.generate([8, 9], PARAMS)
        except KeyboardInterrupt:
            pass
        assert llm.generate([5, 6, 7], PARAMS)[0].token_ids == first
    llm.close()
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
print("end")
"""


def run_script(what: str) -> tuple[subprocess.CompletedProcess[str], list[int]]:
    """A user's script, without a guard around its body."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny("mixtral")), what],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return result, [int(pid) for pid in result.stdout.splitlines()[0].split()]


def all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + LIMIT
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(psutil.pid_exists, pids))


def test_ranks_end_with_a_driver_that_is_killed() -> None:
    result, pids = run_script("kill")
    assert result.returncode == -signal.SIGKILL
    assert all_end(pids)


def test_ranks_end_with_a_script_that_does_not_close() -> None:
    result, pids = run_script("nothing")
    assert (result.returncode, result.stdout.splitlines()[-1], result.stderr) == (0, "end", "")
    assert all_end(pids)


def test_ctrl_c_ends_the_request_and_not_the_engine() -> None:
    result, pids = run_script("interrupt")
    assert (result.returncode, result.stdout.splitlines()[-1], result.stderr) == (0, "end", "")
    assert all_end(pids)


def test_ctrl_c_while_a_step_is_sent_leaves_no_rank_that_owes_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(tiny("mixtral"), **{**OPTIONS, "worker_timeout": 2.0}) as llm:
        first = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
        with monkeypatch.context() as patch:
            patch.setattr("flexmoe.parallel.supervisor.pickle.dumps", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS, PARAMS)
        time.sleep(3.0)
        assert [output.token_ids for output in llm.generate(PROMPTS, PARAMS)] == first


def test_no_port_is_held() -> None:
    with LLM(tiny("mixtral"), **OPTIONS) as llm:
        runner = llm.engine.runner
        assert isinstance(runner, ranks.RankedRunner)
        port = runner.ranks._launched.store.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's slack")
def test_a_rank_that_glances_at_its_device_does_not_oversleep() -> None:
    """In a thread of its own, since it holds for a thread."""
    found: list[int] = []

    def work() -> None:
        rank.wake_in_time()
        found.append(ctypes.CDLL(None).prctl(30, 0, 0, 0, 0))  # PR_GET_TIMERSLACK

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1000]
