"""Two Ray nodes on this machine, a rank on each: the tokens of one process, deaths told as those of children, and
nothing left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import flexmoe
from flexmoe import LLM
from flexmoe.engine.ranks import RankedRunner
from flexmoe.errors import CheckpointError, ConfigError, EngineError, RankError
from flexmoe.parallel.child import SAFE_ENVIRONMENT
from flexmoe.parallel.ray import Need, RayCluster
from flexmoe.parallel.supervisor import Supervisor
from tests.cpu.tiny_models import tiny
from tests.multi.test_supervisor import LIMIT, OPTIONS, PARAMS, PROMPTS, ROOT, all_end, soon
from tests.multi.worker import PoolWorker

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'flexmoe[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils")

ON_RAY: dict[str, Any] = {**OPTIONS, "launcher": "ray"}
HEAD = {"num_gpus": 2, "include_dashboard": False}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Of the nodes: short, for it is part of the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="fmr-", ignore_cleanup_errors=True) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """A head with one CPU and what Ray takes for two GPUs, and a second node with one CPU."""
    tiny("mixtral")
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "temp_dir": str(folder / "ray")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(path or "." for path in sys.path))
        made = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, **HEAD})
        made.add_node(**node, num_gpus=0)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        ray.shutdown()
        made.shutdown()


class Left:
    """What a launch leaves behind: this process's ports, temporary files, and what Ray holds."""

    def __init__(self, folder: Path) -> None:
        RayCluster()  # whose own ports are none of ours
        self._folder, self._before, self._files = folder, self._ports(), self._names(folder)

    def _ports(self) -> set[int]:
        found = psutil.Process().net_connections()
        return {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}

    def is_nothing(self) -> bool:
        assert self._ports() <= self._before
        deadline = time.monotonic() + LIMIT  # Ray counts what it was given back a moment later
        while (found := self._held()) != ([], [], 2):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())

    def _held(self) -> tuple[list[str], list[str], float | None]:
        found = sorted(self._names(self._folder) - self._files)
        return found, keepers(), ray.available_resources().get("CPU")

    @staticmethod
    def _names(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()}


def keepers() -> list[str]:
    """The names of keepers that run on this machine."""
    names = [process.info["name"] or "" for process in psutil.process_iter(["name", "status"])
             if process.info["status"] != psutil.STATUS_ZOMBIE]  # fmt: skip
    return [name for name in names if name.startswith("ray::Keeper")]


def pids(llm: LLM) -> list[int]:
    assert isinstance(llm.engine.runner, RankedRunner)
    return [member.process.pid for member in llm.engine.runner.ranks.members if member.process is not None]


@pytest.mark.parametrize(
    "degrees",
    [{"tensor_parallel_size": 2, "expert_parallel_size": 2}, {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}],
    ids=["experts", "stages"],
)
def test_tokens_are_those_of_one_process(cluster: Any, folder: Path, degrees: dict[str, int]) -> None:
    left = Left(folder)
    with LLM(tiny("mixtral"), **{**OPTIONS, "tensor_parallel_size": 1}) as llm:
        expected = [out.token_ids for out in llm.generate(PROMPTS, PARAMS)]
    with LLM(tiny("mixtral"), **{**ON_RAY, **degrees}) as llm:
        assert [out.token_ids for out in llm.generate(PROMPTS, PARAMS)] == expected
        ranks = [psutil.Process(pid) for pid in pids(llm)]
        assert len({rank.parent().ppid() for rank in ranks}) == 2, "both are below the same node"  # type: ignore[union-attr]
        assert all(rank.environ().items() >= SAFE_ENVIRONMENT.items() for rank in ranks)
    assert not any(rank.is_running() for rank in ranks)
    assert left.is_nothing()


def test_a_rank_that_dies(cluster: Any, folder: Path) -> None:
    left = Left(folder)
    llm = LLM(tiny("mixtral"), **ON_RAY)
    ranks = pids(llm)
    Path(f"/proc/{ranks[1]}/fd/2").write_text("these are the last words\n")
    os.kill(ranks[1], signal.SIGKILL)
    with soon(), pytest.raises(RankError) as caught:
        llm.generate(PROMPTS * 20, PARAMS)
    said = f"rank 1 of 2 (tp 1, etp 1) on node {ray.util.get_node_ip_address()} died with exit code -9 (SIGKILL) while "
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("its log ends: these are the last words")
    assert (caught.value.rank, caught.value.exit_code) == (1, -9)
    assert all_end(ranks)
    assert left.is_nothing()
    llm.close()


def test_a_rank_that_hangs(cluster: Any, folder: Path) -> None:
    left = Left(folder)
    llm = LLM(tiny("mixtral"), **ON_RAY, worker_timeout=2.0)
    ranks = pids(llm)
    os.kill(ranks[0], signal.SIGSTOP)
    with soon(), pytest.raises(RankError, match=r"rank 0 of 2 .* on node .* hangs: no sign of work for 2 s"):
        llm.generate(PROMPTS, PARAMS)
    assert all_end(ranks)
    assert left.is_nothing()


SCRIPT = """
import os, signal, sys
from flexmoe import LLM
from tests.multi.test_supervisor import OPTIONS
llm = LLM(sys.argv[1], launcher="ray", **OPTIONS)
print(*[member.process.pid for member in llm.engine.runner.ranks.members], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_end_with_a_driver_that_is_killed(cluster: Any, folder: Path) -> None:
    left = Left(folder)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny("mixtral"))],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert all_end([int(pid) for pid in result.stdout.split()])
    assert left.is_nothing()


def test_ranks_on_one_node_see_the_gpus_of_all(cluster: Any, folder: Path) -> None:
    """A tensor group fits on the head; each rank takes the GPU of its number there, and can reach the other's."""
    left = Left(folder)
    ranks = Supervisor(RayCluster().start("tests.multi.worker", Need(2, (2,), 0, 1), 60.0, None), 60.0, str)
    found = ranks.wait(ranks.post("call", (__name__, "place", {}), "testing", owed=[0, 1]))
    ranks.close()
    visible = found[0][0]
    assert sorted(visible.split(",")) == ["0", "1"]
    assert found == {0: (visible, 0, 2), 1: (visible, 1, 2)}
    assert left.is_nothing()


def place(worker: PoolWorker) -> tuple[str, int, int]:
    return os.environ["CUDA_VISIBLE_DEVICES"], worker.setup.local_rank, worker.setup.machine_size


def test_a_cluster_that_is_too_small(cluster: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(tiny("mixtral"), **{**ON_RAY, "tensor_parallel_size": 4})
    assert str(caught.value) == (
        "the plan has 4 ranks (pipeline x data x tensor) with 1 CPU (threads) each, but the Ray cluster has 2 CPUs on "
        "2 nodes, room for 2; use lower degrees or fewer threads, or add nodes."
    )
    with pytest.raises(ConfigError, match=r"4 ranks .* with a GPU each, but the Ray cluster has 2 GPUs on 2 nodes"):
        LLM(tiny("mixtral"), **{**ON_RAY, "tensor_parallel_size": 4, "device": "cuda"})


def test_a_node_without_the_model(cluster: Any, folder: Path) -> None:
    left = Left(folder)
    node = ray.util.get_node_ip_address()
    with pytest.raises(CheckpointError, match=f"folder /nowhere does not exist on node {node}"):
        RayCluster().start("flexmoe.engine.worker", Need(2, (2,), 1, 0), 60.0, Path("/nowhere"))
    assert left.is_nothing()


def test_a_node_with_another_version(cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = Left(folder)
    here = flexmoe.__version__
    monkeypatch.setattr(flexmoe, "__version__", "99.0")
    with pytest.raises(EngineError, match=f"has flexmoe {here}, torch .*, but this process has flexmoe 99.0, torch"):
        RayCluster().start("flexmoe.engine.worker", Need(2, (2,), 1, 0), 60.0, None)
    assert left.is_nothing()


def test_no_cluster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with soon(), pytest.raises(EngineError, match=r"finds no Ray cluster at 127.0.0.1:1 \(.*refused\); start one with"):
        LLM(tiny("mixtral"), **ON_RAY)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ConfigError, match="must run on a machine of the cluster"):
        LLM(tiny("mixtral"), **ON_RAY)


def test_a_node_that_is_lost(cluster: Any, folder: Path) -> None:
    """The last test: the head alone stays."""
    llm = LLM(tiny("mixtral"), **ON_RAY)
    ranks = pids(llm)
    raylet = psutil.Process(cluster.worker_nodes.copy().pop().all_processes["raylet"][0].process.pid)
    lost = next(rank for rank in (0, 1) if raylet in psutil.Process(ranks[rank]).parents())
    Path(f"/proc/{ranks[lost]}/fd/2").write_text("these are the last words\n")
    process = llm.engine.runner.ranks.members[lost].process
    while b"last words" not in process.tail():  # they reach the driver with the next report
        time.sleep(0.05)
    raylet.kill()
    words = rf"rank {lost} of 2 .* on node .* is gone: .*; its log ends: these are the last words"
    with soon(), pytest.raises(RankError, match=words):
        generate_on_and_on(llm)
    assert all_end(ranks)
    llm.close()


def generate_on_and_on(llm: LLM) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        llm.generate(PROMPTS, PARAMS)
