"""LayerLoad: how often each expert of a layer was chosen. Enters: counts of the engine, or a recording's lines.

A recording is a file of JSON lines, one for each MoE layer (docs/routing.md). Engine and planner share it as they
share the plan: the one writes it, the other reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.config.plan import ExpertPlacement
from flexmoe.errors import ConfigError

# What a recording of a huge model has: 1000 layers with 1000 experts of 10 digits each.
_MOST_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """What a MoE layer's experts had to do.

    counts [E]: how many tokens chose each expert. passes: forward passes that were counted, a step's decodes and its
    prompts by themselves where they are computed so. tokens: rows of these passes. active [E]: in how many passes at
    least one token chose the expert.
    """

    model: str
    layer: int
    top_k: int
    counts: tuple[int, ...]
    passes: int
    tokens: int
    active: tuple[int, ...]

    @property
    def mean_active(self) -> float:
        """Experts that a pass read."""
        return sum(self.active) / self.passes if self.passes else 0.0

    def plus(self, other: LayerLoad) -> LayerLoad:
        """Both together. Raises ConfigError if they are not of one model's layer."""
        if (self.model, self.layer, self.top_k, len(self.counts)) != (
            other.model, other.layer, other.top_k, len(other.counts),
        ):  # fmt: skip
            raise ConfigError(
                f"loads of {self.model!r}, layer {self.layer}, and {other.model!r}, layer {other.layer}, cannot be "
                "added; use recordings of one model."
            )
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        active = tuple(a + b for a, b in zip(self.active, other.active, strict=True))
        passes, tokens = self.passes + other.passes, self.tokens + other.tokens
        return LayerLoad(self.model, self.layer, self.top_k, counts, passes, tokens, active)

    def to_json(self) -> dict[str, Any]:
        """One line of a recording."""
        return {
            "model": self.model, "layer": self.layer, "num_experts": len(self.counts), "top_k": self.top_k,
            "passes": self.passes, "tokens": self.tokens, "counts": list(self.counts), "active": list(self.active),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> LayerLoad:
        """Read a line. Keys it does not know are left out. Raises ConfigError."""
        try:
            counts, active = (tuple(_count(n) for n in data[key]) for key in ("counts", "active"))
            numbers = [_count(data[key]) for key in ("layer", "top_k", "passes", "tokens")]
            if (
                not counts
                or not len(counts) == len(active) == data["num_experts"]
                or not isinstance(data["model"], str)
            ):
                raise TypeError
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "it is not an object with model, layer, num_experts, top_k, passes, tokens, and of each expert a "
                "number in counts and in active."
            ) from error
        layer, top_k, passes, tokens = numbers
        return cls(data["model"], layer, top_k, counts, passes, tokens, active)


def write_recording(path: str | Path, loads: Iterable[LayerLoad]) -> None:
    """Write a line for each layer. Raises ConfigError if the file cannot be written."""
    lines = [json.dumps(load.to_json()) + "\n" for load in loads]
    try:
        Path(path).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the recording {path} cannot be written: {error.strerror}.") from error


def read_recording(path: str | Path) -> list[LayerLoad]:
    """The loads in a file, by layer; lines of one layer, as of several recordings in one file, are added up.

    Raises ConfigError for what is not a recording, or one of several models.
    """
    found: dict[int, LayerLoad] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            load = LayerLoad.from_json(json.loads(line))
            _check_alike(load, next(iter(found.values()), load))
            found[load.layer] = found[load.layer].plus(load) if load.layer in found else load
        except ValueError as error:
            reason = error if isinstance(error, ConfigError) else f"it is not JSON: {error}"
            raise ConfigError(f"the recording {path} is refused, line {number}: {reason}") from error
    if not found:
        raise ConfigError(f"the recording {path} is empty.")
    return [found[layer] for layer in sorted(found)]


def _text(path: str | Path) -> str:
    try:
        if Path(path).stat().st_size > _MOST_BYTES:
            raise ConfigError(f"the recording {path} is larger than {_MOST_BYTES >> 20} MiB.")
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the recording {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the recording {path} is refused: it is not text in UTF-8.") from error


def imbalance(loads: Sequence[float]) -> float:
    """Largest over mean: 1 if all have the same to do, their number if one does everything. 1 where there is none."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def rank_loads(counts: Sequence[int], placement: ExpertPlacement) -> list[float]:
    """What each rank has to do, if the replicas of an expert share its tokens evenly."""
    replicas = _replicas(placement)
    return [sum(counts[expert] / replicas[expert] for expert in rank) for rank in placement.slots]


def rank_active(load: LayerLoad, placement: ExpertPlacement) -> list[float]:
    """Experts that each rank reads in a pass, on average. A replica counts as often as it can have a token at most."""
    replicas, passes = _replicas(placement), max(1, load.passes)

    def reads(expert: int) -> float:
        return min(load.active[expert], load.counts[expert] / replicas[expert])

    return [sum(map(reads, rank)) / passes for rank in placement.slots]


def _replicas(placement: ExpertPlacement) -> list[int]:
    """Of each expert."""
    found = [0] * placement.num_experts
    for rank in placement.slots:
        for expert in rank:
            found[expert] += 1
    return found


def _check_alike(load: LayerLoad, first: LayerLoad) -> None:
    if (load.model, len(load.counts)) != (first.model, len(first.counts)):
        raise ConfigError(
            f"it is of {load.model!r} with {len(load.counts)} experts, the lines before of {first.model!r} with "
            f"{len(first.counts)}; use recordings of one model."
        )


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(value)
    return value
