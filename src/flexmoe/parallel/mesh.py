"""Mesh: this rank's groups, by name. Enters: a plan, and torch.distributed if it is joined. Leaves: Groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from flexmoe.config.layout import GROUPS, RankLayout
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import Shard
from flexmoe.parallel.comm import Group, Traffic
from flexmoe.parallel.network import interface_to
from flexmoe.parallel.pipeline import Pipeline

TCPStore = dist.TCPStore  # type: ignore[attr-defined]  # exported, if not by a word


class Mesh:
    """The groups of one rank: tp slices attention and dense layers, ep spreads experts, etp slices each of them,
    stage is all of ep x etp, dp are the replicas, pp the stages, world everybody.
    """

    def __init__(
        self, plan: ParallelPlan, rank: int = 0, handles: Mapping[str, dist.ProcessGroup] | None = None
    ) -> None:
        """handles: by group name, for groups of more than one. Without them the other ranks are only imagined."""
        self.plan, self.rank = plan, rank
        self.layout = RankLayout(plan)
        self.place = self.layout.coordinates(rank)
        self.traffic = Traffic()
        self.machine_size = plan.num_ranks  # ranks on this machine, which share its main memory
        made = {name: self._group(name, handles or {}) for name in GROUPS}
        self.world, self.stage = made["world"], made["stage"]
        self.pp, self.dp, self.tp = made["pp"], made["dp"], made["tp"]
        self.ep, self.etp = made["ep"], made["etp"]
        self.pipeline = Pipeline(self.pp)

    @classmethod
    def connect(cls, plan: ParallelPlan, rank: int, timeout: float) -> Mesh:
        """The mesh of a rank in the world that `join` made. All ranks call this together, with the same plan."""
        layout = RankLayout(plan)
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        handles: dict[str, dist.ProcessGroup] = {}
        for name in GROUPS:
            for ranks in layout.groups(name):
                if len(ranks) > 1 and ranks not in made:
                    made[ranks] = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
            if layout.group(name, rank) in made:
                handles[name] = made[layout.group(name, rank)]
        return cls(plan, rank, handles)

    def shard(self, config: ModelConfig) -> Shard:
        """What this rank holds of a model."""
        return Shard(self.plan, config, self.rank)

    def close(self) -> None:
        """Let go of the groups; the world that was joined stays."""
        groups = (self.world, self.stage, self.pp, self.dp, self.tp, self.ep, self.etp)
        for handle in {id(group.handle): group.handle for group in groups if group.handle is not None}.values():
            dist.destroy_process_group(handle)
        for group in groups:
            group.handle = None

    def _group(self, name: str, handles: Mapping[str, dist.ProcessGroup]) -> Group:
        size = len(self.layout.group(name, self.rank))
        return Group(size, getattr(self.place, name), handles.get(name), self.traffic)


def join(host: str, port: int, rank: int, size: int, device: torch.device, timeout: float) -> None:
    """Join the world of `size` ranks that meet at the store at host:port. gloo for a CPU, NCCL for CUDA."""
    interface = interface_to(host, port)
    if interface is not None:  # gloo may pick one that leads nowhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    limit = timedelta(seconds=timeout)
    store = TCPStore(host, port, is_master=False, timeout=limit)
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=device if cuda else None,
    )


def leave() -> None:
    """Leave the world, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
