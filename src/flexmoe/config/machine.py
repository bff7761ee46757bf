"""Machine: what a plan is made for: devices, the links between them, and what was measured there. No torch.

Enters: a JSON file as `flexmoe bench machine` writes it, the name of a machine that comes with the package, or a
machine file of FlexFlow (`flexflow_machine.py`). Leaves: a Machine. Files have units that people read (GiB, GB/s,
microseconds), objects have bytes and seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from flexmoe.config.fields import number, positive, required, six_digits
from flexmoe.config.flexflow_machine import is_flexflow_machine, read_flexflow_machine
from flexmoe.config.serving import Serving
from flexmoe.errors import ConfigError, UnknownOptionError

KINDS = ("cuda", "cpu")
_KEYS = ("machine", "version", "devices_per_node", "nodes", "device", "links", "reserve_gib", "serving", "extrapolated",
         "notes", "samples")  # fmt: skip
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "one_shot", "send")
_VERSION = 1
_GIB = 2**30
_SHIPPED = files("flexmoe") / "assets" / "machines"


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What computes. A GPU is a rank's own; a CPU is shared by the ranks of its machine, and this is all of it.

    read_bandwidth: bytes a second of a plain stream. peak_flops: of matrix products, by dtype. launch_s: what an
    operation takes that has next to nothing to do. host_s and host_row_s: what a step, and each of its rows,
    takes beside operations. prompt_layer_s: what the host takes to launch a layer of prompts where that is no graph,
    while a GPU computes what was launched before. torch_layer_s and torch_chunk_s: the same in torch, and for each
    further prompt in it. cores: of a CPU.
    """

    kind: str
    name: str
    memory_bytes: int
    read_bandwidth: float
    peak_flops: Mapping[str, float]
    launch_s: float
    host_s: float
    host_row_s: float = 0.0
    prompt_layer_s: float = 0.0
    torch_layer_s: float = 0.0
    torch_chunk_s: float = 0.0
    cores: int = 0

    def flops(self, dtype: str) -> float:
        """Of a dtype; where it is not known, of the widest that is."""
        return self.peak_flops.get(dtype) or min(self.peak_flops.values())


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective as it was measured. num_bytes: of the whole tensor, as benchmarks/collectives.py counts it.

    captured: inside a CUDA graph, where no host calls it. one_shot: a sum of ranks that read each other's memory.
    """

    op: str
    ranks: int
    num_bytes: int
    seconds: float
    captured: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """How ranks reach each other within groups of `size` devices. latency_s: of two ranks; bandwidth: of one rank.

    size 0: all devices of the machine. Where something was measured, that goes before latency and bandwidth.
    """

    name: str
    size: int
    latency_s: float
    bandwidth: float
    measured: tuple[Exchange, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One operation as it was measured.

    op, rows and shape: as planner/operations.py defines them. ranks: how many computed it at once on one CPU, each on
    its share of the cores.
    """

    op: str
    dtype: str
    rows: int
    shape: tuple[float, ...]
    seconds: float
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices alike, on nodes alike. links: innermost first.

    devices_per_node: GPUs, or the cores of a CPU, each of which can have a rank of its own. reserve_bytes: of each
    device, for what is neither weights nor cache nor activations. samples: measured operations. extrapolated: which
    parts nobody measured here, in words. notes: where the rest comes from: date, versions, commit. serving: what
    an HTTP server adds; None where nobody measured it, and then predictions are of the engine alone.
    """

    name: str
    devices_per_node: int
    nodes: int
    device: DeviceSpec
    links: tuple[Link, ...] = ()
    samples: tuple[Sample, ...] = ()
    reserve_bytes: int = 0
    extrapolated: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    serving: Serving | None = None

    def __post_init__(self) -> None:
        for name in ("devices_per_node", "nodes"):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"the machine's {name}={value!r} is not a positive integer.")
        if self.device.kind not in KINDS:
            raise ConfigError(f"the device's kind={self.device.kind!r} is not one of {', '.join(KINDS)}.")
        if self.num_devices > 1 and not self.links:
            raise ConfigError(f"the machine has {self.num_devices} devices but no links; say how they are connected.")

    @property
    def num_devices(self) -> int:
        return self.devices_per_node * self.nodes

    @property
    def is_shared(self) -> bool:
        """Whether the ranks of a node share one device."""
        return self.device.kind == "cpu"

    def link(self, ranks: range | tuple[int, ...]) -> Link:
        """The innermost link that all these ranks have in common. Ranks are numbered node by node."""
        for link in self.links:
            if not link.size or len({rank // link.size for rank in ranks}) == 1:
                return link
        return self.links[-1]

    def reach(self, devices: int) -> int:
        """How many of so many devices have a link in common."""
        return max((min(link.size or devices, devices) for link in self.links), default=1)

    def resized(self, devices: int) -> Machine:
        """So many of these devices: nodes as here, the last of them full. What is larger than here is extrapolated."""
        per_node = min(devices, self.devices_per_node)
        nodes = -(-devices // per_node)
        if (per_node, nodes) == (self.devices_per_node, self.nodes):
            return self
        return replace(self, name=f"{self.name} x {devices}", devices_per_node=per_node, nodes=nodes)

    def save(self, path: str | Path) -> None:
        """Write the machine as JSON, a line for each measurement. Raises ConfigError if that fails."""
        try:
            Path(path).write_text(_text(self), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the machine file {path} cannot be written: {error.strerror}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """The machine in a file, or one of `shipped_machines` by its name. Raises ConfigError, in one line."""
        name = str(path)
        if name in shipped_machines():
            return _read(machine_text(name), name)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            known = ", ".join(shipped_machines())
            raise ConfigError(
                f"the machine {name!r} is neither a file that can be read ({error.strerror}) nor one of {known}."
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the machine file {name} is refused: it is not text in UTF-8.") from error
        return _read(text, name)


def shipped_machines() -> tuple[str, ...]:
    """Names of the machines that come with the package."""
    return tuple(sorted(Path(entry.name).stem for entry in _SHIPPED.iterdir() if entry.name.endswith(".json")))


def machine_text(name: str) -> str:
    """The file of one of `shipped_machines`."""
    return _SHIPPED.joinpath(f"{name}.json").read_text(encoding="utf-8")


def _text(machine: Machine) -> str:
    """JSON with a line for each measurement, so that people can read it and git compare it."""
    device = machine.device
    head: dict[str, Any] = {
        "machine": machine.name, "version": _VERSION,
        "devices_per_node": machine.devices_per_node, "nodes": machine.nodes,
        "device": {
            "kind": device.kind, "name": device.name, "memory_gib": six_digits(device.memory_bytes / _GIB),
            "read_gb_s": six_digits(device.read_bandwidth / 1e9),
            "tflops": {dtype: six_digits(flops / 1e12) for dtype, flops in device.peak_flops.items()},
            "launch_us": six_digits(device.launch_s * 1e6), "host_us": six_digits(device.host_s * 1e6),
            "host_row_us": six_digits(device.host_row_s * 1e6),
            "prompt_layer_us": six_digits(device.prompt_layer_s * 1e6),
            "torch_layer_us": six_digits(device.torch_layer_s * 1e6),
            "torch_chunk_us": six_digits(device.torch_chunk_s * 1e6), "cores": device.cores,
        },
        "reserve_gib": six_digits(machine.reserve_bytes / _GIB),
        **({} if machine.serving is None else {"serving": machine.serving.to_json()}),
        "extrapolated": list(machine.extrapolated), "notes": dict(machine.notes),
    }  # fmt: skip
    links = _lines([json.dumps(_link_json(link)) for link in machine.links])
    samples = _lines([json.dumps(_sample_json(sample)) for sample in machine.samples])
    return f'{json.dumps(head, indent=1)[:-2]},\n "links": {links},\n "samples": {samples}\n}}\n'


def _lines(items: list[str]) -> str:
    return "[\n  " + ",\n  ".join(items) + "\n ]" if items else "[]"


def _link_json(link: Link) -> dict[str, Any]:
    measured = [[e.op, e.ranks, e.num_bytes, e.captured, six_digits(e.seconds * 1e6)] for e in link.measured]
    return {
        "name": link.name, "size": link.size, "latency_us": six_digits(link.latency_s * 1e6),
        "gb_s": six_digits(link.bandwidth / 1e9), "measured": measured,
    }  # fmt: skip


def _sample_json(sample: Sample) -> list[Any]:
    return [
        sample.op,
        sample.dtype,
        sample.ranks,
        sample.rows,
        [_plain(size) for size in sample.shape],
        six_digits(sample.seconds * 1e6),
    ]


def _plain(size: float) -> float:
    return int(size) if size == int(size) else round(size, 2)


def _read(text: str, where: str) -> Machine:
    try:
        if is_flexflow_machine(text):
            return _machine(read_flexflow_machine(text))
        return _machine(json.loads(text))
    except ValueError as error:
        reason = error if isinstance(error, ConfigError) else f"it is not JSON: {error}"
        raise ConfigError(f"the machine file {where} is refused: {reason}") from error


def _machine(data: Any) -> Machine:
    if not isinstance(data, Mapping):
        raise ConfigError(f"a machine is a JSON object, not {type(data).__name__}.")
    for key in data:
        if key not in _KEYS:
            raise UnknownOptionError(str(key), _KEYS, "a machine")
    if data.get("version", _VERSION) != _VERSION:
        raise ConfigError(f"it is of version {data['version']!r}, but this program reads version {_VERSION}.")
    return Machine(
        name=str(required(data, "machine")),
        devices_per_node=required(data, "devices_per_node"),
        nodes=data.get("nodes", 1),
        device=_device(required(data, "device")),
        links=tuple(map(_link, data.get("links", ()))),
        samples=tuple(map(_sample, data.get("samples", ()))),
        reserve_bytes=round(number(data, "reserve_gib", 0) * _GIB),
        extrapolated=tuple(map(str, data.get("extrapolated", ()))),
        notes=data.get("notes", {}),
        serving=Serving.from_json(data["serving"]) if "serving" in data else None,
    )


def _device(data: Any) -> DeviceSpec:
    flops = required(data, "tflops")
    if not isinstance(flops, Mapping) or not flops:
        raise ConfigError("the device's tflops is not an object with a number for at least one dtype.")
    return DeviceSpec(
        kind=str(required(data, "kind")),
        name=str(required(data, "name")),
        memory_bytes=round(positive(data, "memory_gib") * _GIB),
        read_bandwidth=positive(data, "read_gb_s") * 1e9,
        peak_flops={dtype: positive(flops, dtype) * 1e12 for dtype in flops},
        launch_s=number(data, "launch_us") / 1e6,
        host_s=number(data, "host_us", 0) / 1e6,
        host_row_s=number(data, "host_row_us", 0) / 1e6,
        prompt_layer_s=number(data, "prompt_layer_us", 0) / 1e6,
        torch_layer_s=number(data, "torch_layer_us", 0) / 1e6,
        torch_chunk_s=number(data, "torch_chunk_us", 0) / 1e6,
        cores=round(number(data, "cores", 0)),
    )


def _link(data: Any) -> Link:
    return Link(
        name=str(required(data, "name")),
        size=round(number(data, "size", 0)),
        latency_s=number(data, "latency_us") / 1e6,
        bandwidth=positive(data, "gb_s") * 1e9,
        measured=tuple(map(_exchange, data.get("measured", ()))),
    )


def _exchange(row: Any) -> Exchange:
    match row:
        case [str(op), int(ranks), int(num_bytes), bool(captured), (int() | float()) as us] if op in COLLECTIVES:
            return Exchange(op, ranks, num_bytes, us / 1e6, captured)
    raise ConfigError(
        f"{row!r} is no measured collective; one is [one of {', '.join(COLLECTIVES)}, ranks, bytes, captured (true or "
        "false), microseconds]."
    )


def _sample(row: Any) -> Sample:
    match row:
        case [str(op), str(dtype), int(ranks), int(rows), list(shape), (int() | float()) as us] if us > 0:
            return Sample(op, dtype, rows, tuple(float(size) for size in shape), us / 1e6, ranks)
    raise ConfigError(
        f"{row!r} is no measured operation; one is [operation, dtype, ranks, rows, [sizes], microseconds]."
    )
