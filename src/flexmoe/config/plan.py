"""ParallelPlan and ExpertPlacement: how a model is spread over ranks, and which rank holds which expert.

The planner writes these; loader, dispatcher, memory estimate and simulator read them. A *physical slot* is the place
of one logical expert, or of one replica of it, on a rank; every index that reaches an expert kernel is such a slot.

Ranks = pipeline x data x tensor. Inside a stage the data x tensor ranks are shared by the MoE layers as ep x etp:
whole experts are spread over ep of them, and the etp ranks of each share slice every expert of it. `layout.py` says
which rank is where, `shard.py` what a rank holds of a model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flexmoe.errors import ConfigError, UnknownOptionError

MOE_DISPATCH = ("auto", "all_reduce", "all_to_all")
DEGREES = ("tensor_parallel_size", "expert_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Physical slots of one MoE layer, rank by rank of the ranks that experts are spread over.

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

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    def local_slots(self, rank: int) -> tuple[int, ...]:
        """The logical expert of each slot on `rank`."""
        return self.slots[rank]

    def slots_of(self, expert: int, rank: int) -> tuple[int, ...]:
        """The slots on `rank` that hold `expert`: none, one, or several replicas."""
        return tuple(slot for slot, held in enumerate(self.slots[rank]) if held == expert)

    def replicas(self, expert: int) -> tuple[tuple[int, int], ...]:
        """All places of `expert` as (rank, slot), in order."""
        return tuple((rank, slot) for rank in range(len(self.slots)) for slot in self.slots_of(expert, rank))


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """How a model is spread over ranks.

    moe_dispatch: how tokens meet experts on other ranks. "all_reduce": each rank computes what its own experts (or
    slices) give for all tokens, and the results are added over the ranks. "all_to_all": each rank owns a share of the
    tokens and sends each to the ranks of its experts. "auto": all_reduce.
    placements: by layer, where its experts are; under None for the layers not named; contiguous where neither is.

    Raises ConfigError for degrees that do not go together. `shard.check` holds the plan against a model.
    """

    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    moe_dispatch: str = "auto"
    placements: Mapping[int | None, ExpertPlacement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in DEGREES:
            degree: object = getattr(self, name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ConfigError(f"{name}={degree!r} is not a positive integer.")
        if self.moe_dispatch not in MOE_DISPATCH:
            raise ConfigError(f"moe_dispatch={self.moe_dispatch!r} is not one of {', '.join(MOE_DISPATCH)}.")
        self._check_expert_degree()
        self._check_placements()

    @property
    def num_ranks(self) -> int:
        return self.pipeline_parallel_size * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage; its MoE layers share them as ep x etp."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Ranks over which each expert is sliced (etp)."""
        return self.stage_size // self.expert_parallel_size

    @property
    def uses_all_to_all(self) -> bool:
        """Whether MoE layers send tokens to the ranks of their experts."""
        return self.moe_dispatch == "all_to_all" and self.stage_size > 1

    @property
    def moves_tokens(self) -> bool:
        """Whether tokens travel to their experts: to single ranks, or from data rank to data rank."""
        return self.uses_all_to_all or self.data_parallel_size > 1

    def placement(self, num_experts: int, layer: int | None = None) -> ExpertPlacement:
        """Where the experts of a MoE layer are."""
        found = self.placements.get(layer, self.placements.get(None))
        return found or ExpertPlacement.contiguous(num_experts, self.expert_parallel_size)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads. Layers placed alike share an entry; "layers": null stands for all not named."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "placements"}
        alike: dict[ExpertPlacement, list[int | None]] = {}
        for layer, placement in self.placements.items():
            alike.setdefault(placement, []).append(layer)
        data["placements"] = []
        for placement, layers in alike.items():
            entry: dict[str, Any] = {"num_experts": placement.num_experts, "slots": [list(s) for s in placement.slots]}
            named = sorted(layer for layer in layers if layer is not None)
            data["placements"] += [{"layers": None, **entry}] if None in layers else []
            data["placements"] += [{"layers": named, **entry}] if named else []
        return data

    @classmethod
    def from_json(cls, data: Any) -> ParallelPlan:
        """A plan from JSON's types. Keys may be left out; others are refused. Raises ConfigError."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a plan is a JSON object, not {type(data).__name__}.")
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise UnknownOptionError(str(name), known, "a plan")
        return cls(**{**data, "placements": _read_placements(data.get("placements", []))})

    @classmethod
    def read(cls, path: str | Path) -> ParallelPlan:
        """The plan in a JSON file. Raises ConfigError if there is none, or not a plan."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"the plan {path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            reason = error if isinstance(error, ConfigError) else f"it is not JSON: {error}"
            raise ConfigError(f"the plan {path} is refused: {reason}") from error

    def write(self, path: str | Path) -> None:
        """Write the plan as a JSON file. Raises ConfigError if that fails."""
        try:
            Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the plan {path} cannot be written: {error.strerror}.") from error

    def _check_expert_degree(self) -> None:
        ep, stage = self.expert_parallel_size, self.stage_size
        if stage % ep:
            fitting = join_choices(d for d in range(1, stage + 1) if stage % d == 0)
            raise ConfigError(
                f"expert_parallel_size={ep} does not divide the {stage} ranks (data_parallel_size x "
                f"tensor_parallel_size) that share the experts; use {fitting}, or more ranks "
                f"(tensor_parallel_size={ep})."
            )

    def _check_placements(self) -> None:
        for layer, placement in self.placements.items():
            if placement.num_ranks != self.expert_parallel_size:
                where = "the placement of all layers" if layer is None else f"the placement of layer {layer}"
                raise ConfigError(
                    f"{where} is for {placement.num_ranks} ranks, but expert_parallel_size="
                    f"{self.expert_parallel_size}; make them equal."
                )


def _read_placements(entries: Any) -> dict[int | None, ExpertPlacement]:
    found: dict[int | None, ExpertPlacement] = {}
    try:
        for entry in entries:
            slots = tuple(tuple(_integer(expert) for expert in rank) for rank in entry["slots"])
            placement = ExpertPlacement(_integer(entry["num_experts"]), slots)
            layers: Sequence[Any] = [None] if entry["layers"] is None else entry["layers"]
            found.update({None if layer is None else _integer(layer): placement for layer in layers})
    except (KeyError, TypeError) as error:
        raise ConfigError(
            "placements of a plan is not a list of objects with num_experts (an integer), slots (for each rank the "
            "experts it holds) and layers (a list of integers, or null for all)."
        ) from error
    return found


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(value)
    return value


def join_choices(values: Iterable[int]) -> str:
    """1, 2 or 4."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
