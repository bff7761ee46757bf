"""Machine files: read back as written, those that come along, FlexFlow's, and what is wrong with others in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexmoe.config.machine import DeviceSpec, Exchange, Link, Machine, Sample, shipped_machines
from flexmoe.config.serving import Serving
from flexmoe.errors import ConfigError

GPU = DeviceSpec("cuda", "a GPU", 80 * 2**30, 3e12, {"bfloat16": 7e14, "float32": 5e13}, 2e-6, 3e-5, 1e-6, 1e-3, 5e-5)
LINKS = (
    Link("nvlink", 4, 4e-6, 3e11, (Exchange("all_reduce", 2, 4096, 9e-6, captured=True),)),
    Link("network", 0, 2e-5, 4e10),
)
MACHINE = Machine(
    "two nodes", 4, 2, GPU, LINKS, (Sample("fused.experts", "bfloat16", 64, (41.52, 2048, 1024), 1.5e-4),), 2**31,
    ("network",), {"date": "today"},
)  # fmt: skip
FLEXFLOW = """
# as FlexFlow's machine_config_example
num_nodes = 2
num_sockets_per_node = 2
num_cpus_per_socket = 1
num_gpus_per_socket = 4
nic_latency = 0.0005
nic_bandwidth = 20.9
pci_latency = 0.001
pci_bandwidth = 16 # GB/s
nvlink_latency = 0.001
nvlink_bandwidth = 18.52
intra_socket_gpu_fb_mem_to_gpu_fb_mem = nvlink
inter_node_gpu_fb_mem_to_gpu_fb_mem = pci_to_host nic pci_to_dev
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "machine.json"
    path.write_text(text)
    return path


def test_a_file_reads_back(tmp_path: Path) -> None:
    MACHINE.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == MACHINE
    assert '["fused.experts", "bfloat16", 1, 64, [41.52, 2048, 1024], 150.0]' in (tmp_path / "machine.json").read_text()


@pytest.mark.parametrize("name", shipped_machines())
def test_machines_that_come_along(name: str) -> None:
    machine = Machine.load(name)
    assert machine.name == name
    assert machine.num_devices == 1 or machine.links
    assert machine.samples or machine.extrapolated, "what nobody measured says so"


def test_what_a_server_adds_reads_back_and_may_be_missing(tmp_path: Path) -> None:
    measured = replace(MACHINE, serving=Serving(2.5e-3, 3e-7, ((1, 4e-4), (16, 2e-3))))
    measured.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == measured
    MACHINE.save(tmp_path / "older.json")
    assert "serving" not in json.loads((tmp_path / "older.json").read_text())
    assert Machine.load(tmp_path / "older.json").serving is None


def test_links_are_the_innermost_in_common() -> None:
    assert [MACHINE.link(ranks).name for ranks in ((0, 3), (4, 6), (3, 4), range(8))] == [
        "nvlink", "nvlink", "network", "network",
    ]  # fmt: skip


def test_more_devices_are_more_nodes() -> None:
    larger = MACHINE.resized(32)
    assert (larger.devices_per_node, larger.nodes, larger.num_devices) == (4, 8, 32)
    assert MACHINE.resized(8) is MACHINE
    assert MACHINE.resized(2).nodes == 1


def test_flexflow_machine_files(tmp_path: Path) -> None:
    machine = Machine.load(written(tmp_path, FLEXFLOW))
    assert (machine.devices_per_node, machine.nodes) == (8, 2)
    assert machine.links[0] == Link("nvlink", 8, pytest.approx(1e-6), pytest.approx(18.52e9))  # type: ignore[arg-type]
    assert machine.links[1].bandwidth == pytest.approx(20.9e9)
    assert machine.extrapolated
    by_pci = FLEXFLOW.replace("mem = nvlink", "mem = pci_to_host pci_to_dev")
    assert Machine.load(written(tmp_path, by_pci)).links[0].name == "pci"


def changed(**changes: object) -> str:
    data = {
        "machine": "m", "devices_per_node": 1,
        "device": {"kind": "cuda", "name": "g", "memory_gib": 80, "read_gb_s": 3000, "tflops": {"bfloat16": 700},
                   "launch_us": 2},
    }  # fmt: skip
    return json.dumps(data | changes)


DEVICE = json.loads(changed())["device"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "a machine is a JSON object, not list"),
        ("{}", "'machine' is missing"),
        (changed(nods=2), "did you mean 'nodes'?"),
        (changed(version=9), "version 9"),
        (changed(nodes=0), "nodes=0 is not a positive integer"),
        (changed(nodes=2), "2 devices but no links"),
        (changed(device=5), "'tflops' is missing"),
        (changed(device=DEVICE | {"kind": "tpu"}), "kind='tpu' is not one of cuda, cpu"),
        (changed(device=DEVICE | {"read_gb_s": 0}), "read_gb_s is 0"),
        (changed(device=DEVICE | {"memory_gib": "80"}), "memory_gib='80' is not a number"),
        (changed(samples=[["linear", "bfloat16", 8, [1, 2], 3]]), "is no measured operation"),
        (changed(links=[{"name": "x", "latency_us": 1, "gb_s": 1, "measured": [["gossip", 2, 3, True, 4]]}]), "gossip"),
        (FLEXFLOW.replace("nic_bandwidth = 20.9", ""), "'nic_bandwidth' is missing"),
        (FLEXFLOW.replace("num_nodes = 2", "num_nodes = two"), "num_nodes = two is not a number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Machine.load(written(tmp_path, text))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "machine.json is refused" in str(error.value)


def test_an_unknown_machine_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"neither a file that can be read .* nor one of cpu2, .*h200x1"):
        Machine.load("h300x1")


def test_dtypes_that_were_not_measured() -> None:
    assert GPU.flops("float16") == 5e13
    assert replace(GPU, peak_flops={"float32": 1.0}).flops("bfloat16") == 1.0
