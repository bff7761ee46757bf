"""Ray places ranks on the machines of a cluster. Enters: what they need. Leaves: Launched, as from launch.spawn.

Ray does no more than that: it reserves processors or GPUs, and starts a keeper for each rank where these are. Commands
and answers go over connections of their own, see keeper.py, and tensors through torch.distributed. The ranks meet at a
store in this process, under the address that it has in the cluster.

This process stays connected to the cluster, since another LLM or the user's own code may use it, too. What was taken
for ranks is given back with them, and by Ray itself if this process dies.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from flexmoe.errors import CheckpointError, ConfigError, EngineError, MissingDependencyError
from flexmoe.parallel.keeper import Keeper, KeptBeats, KeptProcess, Order, Place
from flexmoe.parallel.launch import Launched, Member
from flexmoe.parallel.mesh import TCPStore
from flexmoe.parallel.rank import Setup

_PLACE_SECONDS = 10.0  # what another program has just given back may count as taken for a moment
_START_SECONDS = 60.0  # of a process on a node
_CONNECT_SECONDS = 5.0
_MODEL = "model's folder"  # what a node says beside versions, if it has it


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster, with all that Ray may give away of it."""

    id: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Need:
    """What ranks need. cpus, gpus: each of them. groups: so many neighbours should share a node; what is best first."""

    ranks: int
    groups: tuple[int, ...]
    cpus: int
    gpus: int

    def fits(self, node: Node, together: int = 1) -> int:
        """How many sets of `together` ranks a node can hold."""
        pairs = ((node.cpus, self.cpus * together), (node.gpus, self.gpus * together))
        return min(there // needed for there, needed in pairs if needed)


class Seat(NamedTuple):
    """A rank's place: the bundle of the placement group, and the node that this is on."""

    bundle: int
    node: Node


def cpus_of_each(nodes: Sequence[Node], ranks: int, gpus: int) -> int:
    """The most processors that each of so many ranks can have, if it takes so many GPUs; at least 1."""
    for cpus in range(max((node.cpus for node in nodes), default=0), 1, -1):
        need = Need(ranks, (), cpus, gpus)
        if sum(map(need.fits, nodes)) >= ranks:
            return cpus
    return 1


def seats(bundles: Sequence[Node], together: int, own: str) -> list[Seat]:
    """Ranks to bundles of `together` each: node by node, those with most ranks first, of equals `own`, by its id."""
    count = Counter(node.id for node in bundles)
    order = sorted(
        range(len(bundles)),
        key=lambda i: (-count[bundles[i].id], bundles[i].id != own, bundles[i].id, i),
    )
    return [Seat(bundle, bundles[bundle]) for bundle in order for _ in range(together)]


@dataclass(slots=True)
class _Taken:
    """What Ray holds for the ranks of one launch."""

    group: Any
    keepers: list[Any] = field(default_factory=list)

    def give_back(self) -> None:
        import ray

        if not ray.is_initialized():  # the interpreter ends, and Ray went first
            return
        for keeper in self.keepers:
            ray.kill(keeper)
        ray.util.remove_placement_group(self.group)


class RayCluster:
    """The cluster that this process belongs to."""

    def __init__(self) -> None:
        """Raises MissingDependencyError without Ray, EngineError if no cluster can be reached."""
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError("ray", "ray", "launcher='ray'") from error
        self._ray = ray
        if not ray.is_initialized():
            self._connect()
        elif ray.util.client.ray.is_connected():
            _refuse_client("a connection by Ray Client")
        self.address: str = ray.util.get_node_ip_address()
        alive = [node for node in ray.nodes() if node["Alive"]]
        self.nodes = [
            Node(n["NodeID"], n["NodeManagerAddress"], *(int(n["Resources"].get(kind, 0)) for kind in ("CPU", "GPU")))
            for n in alive
        ]

    def start(self, module: str, need: Need, timeout: float, folder: Path | None) -> Launched:
        """Start ranks that call `run()` of a module. timeout: seconds that a collective of theirs may take.

        folder: of the model, which every node must have. Raises ConfigError if the cluster is too small,
        CheckpointError or EngineError if a node lacks something.
        """
        self._check(need)
        taken, places = self._reserve(need)
        launched = Launched([], after=taken.give_back)
        try:
            self._look({seat.node for seat in places}, folder)
            self._launch(launched, taken, places, module, timeout)
        except BaseException:
            launched.abandon()
            raise
        return launched

    def _connect(self) -> None:
        remedy = "start one with `ray start --head`, and `ray start --address=HOST:6379` on each further machine."
        address = os.environ.get("RAY_ADDRESS") or _recorded_address()
        if "://" in address:
            _refuse_client(f"RAY_ADDRESS={address!r}")
        try:
            if ":" in address:  # Ray itself would try for two minutes
                host, port = address.rsplit(":", 1)
                socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
            self._ray.init(address="auto", log_to_driver=False, logging_level="warning")
        except (OSError, ValueError, RuntimeError) as error:
            where = f" at {address}" if address else ""
            reason = str(error).split(". ")[0].rstrip(".")
            raise EngineError(f"launcher='ray' finds no Ray cluster{where} ({reason}); {remedy}") from error

    def _check(self, need: Need) -> None:
        """Whether the ranks would fit if nobody else had taken anything."""
        room = sum(map(need.fits, self.nodes))
        if room >= need.ranks:
            return
        what = "a GPU" if need.gpus else f"{need.cpus} CPU{'s' * (need.cpus > 1)} (threads)"
        found = sum(node.gpus if need.gpus else node.cpus for node in self.nodes)
        raise ConfigError(
            f"the plan has {need.ranks} ranks (pipeline x data x tensor) with {what} each, but the Ray cluster has "
            f"{found} {'GPUs' if need.gpus else 'CPUs'} on {len(self.nodes)} nodes, room for {room}; use lower degrees"
            f"{'' if need.gpus else ' or fewer threads'}, or add nodes."
        )

    def _reserve(self, need: Need) -> tuple[_Taken, list[Seat]]:
        """Places for all ranks: each group on one node if that can be, on few nodes in any case."""
        ray, kinds = self._ray, {"CPU": need.cpus, "GPU": need.gpus}
        by_id = {node.id: node for node in self.nodes}
        sizes = dict.fromkeys((*need.groups, 1))
        for together in [n for n in sizes if n * sum(need.fits(node, n) for node in self.nodes) >= need.ranks]:
            bundle = {kind: count * together for kind, count in kinds.items() if count}
            group = ray.util.placement_group([bundle] * (need.ranks // together), strategy="PACK")
            if group.wait(_PLACE_SECONDS):
                found = ray.util.placement_group_table(group)["bundles_to_node_id"]
                nodes = [by_id[found[bundle]] for bundle in sorted(found)]
                return _Taken(group), seats(nodes, together, ray.get_runtime_context().get_node_id())
            ray.util.remove_placement_group(group)
        free = ray.available_resources()
        left = " and ".join(f"{free.get(kind, 0):g} {kind}s" for kind, count in kinds.items() if count)
        raise EngineError(
            f"the {need.ranks} ranks found no place in {_PLACE_SECONDS:g} s: of the Ray cluster's {len(self.nodes)} "
            f"nodes {left} are free; wait for what runs there, or use lower degrees."
        )

    def _look(self, nodes: Iterable[Node], folder: Path | None) -> None:
        """Refuse nodes whose versions differ from this process's, or that lack the model."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        look = self._ray.remote(num_cpus=0, max_retries=0)(_looker())
        own = {name: version for name, version in _looker()("").items() if name != _MODEL}
        on = {node: look.options(scheduling_strategy=strategy(node.id, soft=False)) for node in nodes}
        asked = {node: task.remote(str(folder)) for node, task in on.items()}
        for node, answer in asked.items():
            found = self._get(answer, f"node {node.address} cannot run a task")
            theirs = {name: found.get(name, "none") for name in own}
            if any(_public(theirs[name]) != _public(own[name]) for name in own):
                raise EngineError(
                    f"node {node.address} has {_listed(theirs)}, but this process has {_listed(own)}; install the same "
                    "versions on every node."
                )
            if folder is not None and _MODEL not in found:
                raise CheckpointError(
                    f"the model's folder {folder} does not exist on node {node.address}, or has no config.json there; "
                    "put the same files at the same path on every node."
                )

    def _launch(self, launched: Launched, taken: _Taken, places: Sequence[Seat], module: str, timeout: float) -> None:
        key = secrets.token_bytes(32)
        store = launched.store = TCPStore(self.address, 0, is_master=True, wait_for_workers=False)
        found = self._keepers(taken, places, key)
        machines = [seat.node.id for seat in places]
        visible: dict[str, list[str]] = {}  # by node, the GPUs of all ranks on it: they reach each other's directly
        for machine, place in zip(machines, found, strict=True):
            visible.setdefault(machine, []).extend([place.gpus] if place.gpus else [])
        processes: list[KeptProcess] = []
        for rank, (seat, place) in enumerate(zip(places, found, strict=True)):
            gpus = ",".join(visible[seat.node.id])
            order = Order(module, rank, len(places), {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
            process = self._order(place, key, order, seat.node)
            processes.append(process)
            launched.members.append(Member(rank, process.connection, process, seat.node.address))
            local, size = machines[:rank].count(seat.node.id), machines.count(seat.node.id)
            process.connection.send(Setup(rank, len(places), local, size, self.address, store.port, timeout))
        launched.beats = KeptBeats(processes)

    def _keepers(self, taken: _Taken, places: Sequence[Seat], key: bytes) -> list[Place]:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        keeper, bundles = self._ray.remote(Keeper), taken.group.bundle_specs
        together = len(places) // len(bundles)
        for seat in places:
            one = {kind: count / together for kind, count in bundles[seat.bundle].items()}
            taken.keepers.append(
                keeper.options(
                    num_cpus=one.get("CPU", 0),
                    num_gpus=one.get("GPU", 0),
                    max_restarts=0,
                    scheduling_strategy=strategy(taken.group, placement_group_bundle_index=seat.bundle),
                ).remote()
            )
        pairs = list(zip(taken.keepers, places, strict=True))
        heard = [keeper.listen.remote(seat.node.address, key) for keeper, seat in pairs]
        found = [
            self._get(answer, f"rank {rank} cannot be started on node {seat.node.address}")
            for rank, (answer, seat) in enumerate(zip(heard, places, strict=True))
        ]
        for keeper in taken.keepers:
            keeper.run.remote()
        return found

    def _order(self, place: Place, key: bytes, order: Order, node: Node) -> KeptProcess:
        try:
            return KeptProcess(place, key, order)
        except (OSError, EOFError) as error:
            raise EngineError(
                f"rank {order.rank} on node {node.address} cannot be reached at port {place.port}: {error}; let the "
                "machines reach each other on all ports."
            ) from error

    def _get(self, answer: Any, failed: str) -> Any:
        """The result of a task. Raises EngineError that begins with `failed`."""
        try:
            return self._ray.get(answer, timeout=_START_SECONDS)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise EngineError(f"{failed}: {lines[-1].strip()}") from error


def _refuse_client(what: str) -> NoReturn:
    raise ConfigError(
        f"launcher='ray' with {what}: the program must run on a machine of the cluster; start it there, or with "
        "`ray job submit`."
    )


def _recorded_address() -> str:
    """Of the cluster that was started on this machine, as Ray itself finds it; "" if there is none."""
    try:
        return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _looker() -> Callable[[str], dict[str, str]]:
    """What a node is asked first. A function inside a function travels as code, so that it needs no flexmoe there."""

    def look(folder: str) -> dict[str, str]:
        import importlib.metadata
        import importlib.util
        from pathlib import Path

        found = {}
        if importlib.util.find_spec("flexmoe"):
            found["flexmoe"] = importlib.import_module("flexmoe").__version__
        if importlib.util.find_spec("torch"):
            found["torch"] = importlib.metadata.version("torch")
        if Path(folder, "config.json").is_file():
            found[_MODEL] = folder
        return found

    return look


def _public(version: str) -> str:
    """Without the build, which may differ: a driver needs no GPU."""
    return version.partition("+")[0]


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
