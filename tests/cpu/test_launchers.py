"""Who starts the ranks, and where Ray's go: no process is started here, and Ray is not needed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from flexmoe import LLM
from flexmoe.engine import launchers
from flexmoe.engine.launchers import Spawn, UnderTorchrun
from flexmoe.errors import ConfigError, MissingDependencyError
from flexmoe.parallel.mesh import TCPStore
from flexmoe.parallel.network import interface_to, is_loopback
from flexmoe.parallel.ray import Need, Node, cpus_of_each, seats
from tests.cpu.tiny_models import tiny

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SMALL, LARGE, BARE = Node("a", "10.0.0.1", 8, 2), Node("b", "10.0.0.2", 32, 4), Node("c", "10.0.0.3", 16, 0)


def test_torchrun_is_noticed_and_can_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(launchers.choose("auto"), Spawn)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert isinstance(launchers.choose("auto"), UnderTorchrun)
    assert isinstance(launchers.choose("torchrun"), UnderTorchrun)
    assert isinstance(launchers.choose("spawn"), Spawn)


def test_torchrun_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"launcher='torchrun', but torchrun did not start this process"):
        LLM(tiny("mixtral"), tensor_parallel_size=2, launcher="torchrun")


def test_ranks_of_torchrun_share_the_cores_of_their_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launchers, "physical_cores", lambda: 12)
    assert launchers.choose("auto").threads(torch.device("cpu"), 4) == 6
    assert launchers.choose("spawn").threads(torch.device("cpu"), 4) == 3


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError) as caught:
        LLM(tiny("mixtral"), tensor_parallel_size=2, launcher="ray")
    assert str(caught.value) == "launcher='ray' needs the package 'ray': pip install 'flexmoe[ray]'"


@pytest.mark.parametrize(
    ("nodes", "ranks", "gpus", "cpus"),
    [
        ([SMALL], 2, 0, 4),
        ([SMALL], 3, 0, 2),
        ([SMALL, LARGE], 2, 0, 16),  # both on the larger
        ([SMALL, LARGE, BARE], 3, 0, 16),
        ([SMALL, LARGE, BARE], 6, 1, 4),  # two on the small one, four on the large one, none where no GPU is
        ([SMALL], 9, 0, 1),  # they do not fit, which is said later
        ([], 1, 0, 1),
    ],
)
def test_processors_are_shared_out(nodes: list[Node], ranks: int, gpus: int, cpus: int) -> None:
    assert cpus_of_each(nodes, ranks, gpus) == cpus


def test_how_many_ranks_a_node_holds() -> None:
    assert Need(4, (2,), 3, 0).fits(LARGE) == 10
    assert Need(4, (2,), 3, 0).fits(LARGE, together=4) == 2
    assert [Need(4, (2,), 0, 1).fits(node, together=2) for node in (SMALL, LARGE, BARE)] == [1, 2, 0]


def test_neighbours_sit_together() -> None:
    """Ranks in order, whatever the order of Ray's bundles: node by node, the fullest first, then the driver's own."""
    assert [(s.bundle, s.node.id) for s in seats([SMALL, LARGE, SMALL, LARGE, LARGE], 1, "")] == [
        (1, "b"), (3, "b"), (4, "b"), (0, "a"), (2, "a"),
    ]  # fmt: skip
    assert [s.bundle for s in seats([SMALL, LARGE], 2, SMALL.id)] == [0, 0, 1, 1]
    assert [s.bundle for s in seats([SMALL, LARGE], 2, LARGE.id)] == [1, 1, 0, 0]


@pytest.mark.parametrize("options", [{"device": "cuda:0"}])
def test_one_gpu_is_none_for_several_ranks(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "choose_device", torch.device)
    with pytest.raises(ConfigError, match="device='cuda:0' names one GPU, but the plan has 2 ranks; use cuda"):
        Spawn().device("cuda:0", 2)


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are told apart by Linux's own call")
def test_the_interface_that_leads_to_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_loopback(host) for host in ("localhost", "127.0.1.1", "10.0.0.1", "node7")] == [True, True, False, False]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert interface_to("127.0.0.1", store.port) == "lo"
    # A machine's own name may lead to itself only; that says nothing about the others' way to it.
    monkeypatch.setattr("flexmoe.parallel.network.own_address", lambda *_: "127.0.1.1")
    assert interface_to("node7", store.port) is None
