"""RankLayout: which ranks work together on what. Enters: the degrees of a plan. Leaves: coordinates and groups.

rank = (pipeline stage x data + replica) x tensor + slice. The s-th rank of a stage is in share s // etp of the experts
and holds slice s % etp of each: ranks that slice the same experts are neighbours, since they talk most.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe.config.plan import ParallelPlan

# stage: all ranks of one pipeline stage.
GROUPS = ("world", "stage", "pp", "dp", "tp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A rank's place in each group of its own."""

    world: int
    stage: int
    pp: int
    dp: int
    tp: int
    ep: int
    etp: int


@dataclass(frozen=True, slots=True)
class RankLayout:
    """The ranks of a plan."""

    plan: ParallelPlan

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` is in each of its groups."""
        plan = self.plan
        pp, stage = divmod(rank, plan.stage_size)
        dp, tp = divmod(stage, plan.tensor_parallel_size)
        ep, etp = divmod(stage, plan.expert_tensor_size)
        return Coordinates(rank, stage, pp, dp, tp, ep, etp)

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """All groups of that name, which share out the ranks; each in the order of its coordinates."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.plan.num_ranks):
            found.setdefault(self._key(name, self.coordinates(rank)), []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def group(self, name: str, rank: int) -> tuple[int, ...]:
        """The group of that name which `rank` belongs to."""
        return next(ranks for ranks in self.groups(name) if rank in ranks)

    @property
    def samplers(self) -> tuple[int, ...]:
        """The ranks that have whole logits and sample: of each data rank the first of its last stage."""
        last = self.plan.num_ranks - self.plan.stage_size
        return tuple(range(last, self.plan.num_ranks, self.plan.tensor_parallel_size))

    def describe(self, rank: int) -> str:
        """Where a rank is, for people: its coordinates in the dimensions that have more than one."""
        place = self.coordinates(rank)
        plan = self.plan
        sizes = {
            "pp": plan.pipeline_parallel_size, "dp": plan.data_parallel_size, "tp": plan.tensor_parallel_size,
            "ep": plan.expert_parallel_size, "etp": plan.expert_tensor_size,
        }  # fmt: skip
        return ", ".join(f"{name} {getattr(place, name)}" for name, size in sizes.items() if size > 1)

    def _key(self, name: str, c: Coordinates) -> tuple[int, ...]:
        """What the ranks of one group have in common: every coordinate that the group does not vary."""
        keys = {
            "world": (), "stage": (c.pp,), "pp": (c.stage,), "dp": (c.pp, c.tp), "tp": (c.pp, c.dp),
            "ep": (c.pp, c.etp), "etp": (c.pp, c.ep),
        }  # fmt: skip
        return keys[name]
