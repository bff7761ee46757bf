"""FlexFlow's machine file, as its --machine-model-file takes it. Enters: text. Leaves: a machine as our JSON has it.

The format has lines `key = value`: counts (num_nodes, num_sockets_per_node, num_gpus_per_socket), and a latency in
milliseconds and a bandwidth in GB/s for each kind of link (nvlink, pci, nic, upi, membus). It says nothing about the
GPUs themselves, nor which of the links two GPUs of a node use but by its paths: nvlink where
`intra_socket_gpu_fb_mem_to_gpu_fb_mem` names it, else pci.
"""

from __future__ import annotations

import re
from typing import Any

from flexmoe.errors import ConfigError

_LINE = re.compile(r"\s*(\w+)\s*=\s*(.*?)\s*(?:#.*)?$")
_GPU_PATH = "intra_socket_gpu_fb_mem_to_gpu_fb_mem"
_COUNTS = ("num_nodes", "num_sockets_per_node", "num_gpus_per_socket")
# What the format leaves out is that of an NVIDIA A100, the GPU of FlexFlow's own measurements.
_DEVICE = {
    "kind": "cuda", "name": "a GPU like NVIDIA A100", "memory_gib": 79.0, "read_gb_s": 1750.0,
    "tflops": {"bfloat16": 250.0, "float16": 250.0, "float32": 15.0}, "launch_us": 3.0, "host_us": 60.0,
}  # fmt: skip


def is_flexflow_machine(text: str) -> bool:
    """Whether this is that format, not JSON."""
    return any(line[1] in _COUNTS for line in map(_LINE.match, text.splitlines()) if line)


def read_flexflow_machine(text: str) -> dict[str, Any]:
    """The machine. Raises ConfigError for what is missing or no number."""
    found = {line[1]: line[2] for line in map(_LINE.match, text.splitlines()) if line}
    nodes, sockets, gpus = (_count(found, key) for key in _COUNTS)
    links = [_link(found, "nvlink" if "nvlink" in found.get(_GPU_PATH, "pci") else "pci", sockets * gpus)]
    if nodes > 1:
        links.append(_link(found, "nic", 0))
    return {
        "machine": "FlexFlow's machine file", "devices_per_node": sockets * gpus, "nodes": nodes, "device": _DEVICE,
        "links": links, "reserve_gib": 2.0,
        "extrapolated": ["the device, of which FlexFlow's format says nothing", "links, given and not measured"],
    }  # fmt: skip


def _link(found: dict[str, str], name: str, size: int) -> dict[str, Any]:
    latency, bandwidth = _number(found, f"{name}_latency"), _number(found, f"{name}_bandwidth")
    return {"name": name, "size": size, "latency_us": 1e3 * latency, "gb_s": bandwidth}


def _count(found: dict[str, str], key: str) -> int:
    value = _number(found, key)
    if value < 1 or value != int(value):
        raise ConfigError(f"{key} = {found[key]} is not a positive integer.")
    return int(value)


def _number(found: dict[str, str], key: str) -> float:
    try:
        return float(found[key])
    except KeyError as error:
        raise ConfigError(f"{key!r} is missing.") from error
    except ValueError as error:
        raise ConfigError(f"{key} = {found[key]} is not a number.") from error
