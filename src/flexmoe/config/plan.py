"""ParallelPlan and ExpertPlacement: which rank holds which slice of which expert.

The planner writes these, loader, dispatcher and memory estimate read them. A *physical slot* is the place of one
logical expert, or of one replica of it, on a rank; every index that reaches an expert kernel is a physical slot.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from flexmoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Physical slots of one MoE layer, rank by rank.

    slots[r] lists the logical expert in each slot of rank r, in slot order. Uneven counts and replicas are allowed;
    every logical expert must be somewhere.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        placed = {expert for rank in self.slots for expert in rank}
        missing = sorted(set(range(self.num_experts)) - placed)
        unknown = sorted(placed - set(range(self.num_experts)))
        if missing or unknown:
            raise ConfigError(
                f"ExpertPlacement of {self.num_experts} experts: missing {missing}, unknown {unknown}; "
                f"place each expert 0..{self.num_experts - 1} at least once."
            )

    @classmethod
    def contiguous(cls, num_experts: int, ranks: int = 1) -> ExpertPlacement:
        """Experts in order, spread as evenly as the numbers allow; the first ranks take the remainder."""
        base, extra = divmod(num_experts, ranks)
        starts = [r * base + min(r, extra) for r in range(ranks + 1)]
        return cls(num_experts, tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts)))

    def local_slots(self, rank: int) -> tuple[int, ...]:
        """The logical expert of each slot on `rank`."""
        return self.slots[rank]

    def slots_of(self, expert: int, rank: int) -> tuple[int, ...]:
        """The slots on `rank` that hold `expert`: none, one, or several replicas."""
        return tuple(slot for slot, held in enumerate(self.slots[rank]) if held == expert)


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """How a model is spread over ranks. Today one rank holds everything; `engine.py` refuses other degrees."""

    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1

    def placement(self, num_experts: int) -> ExpertPlacement:
        """Where the experts of every MoE layer live."""
        return ExpertPlacement.contiguous(num_experts, self.expert_parallel_size)
