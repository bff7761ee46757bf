"""Which experts the rows of a step choose, and what that leaves the slowest rank. Enters: counts, or an assumption.

Leaves: for so many rows, pairs of a row and an expert, and experts that are read at all, on the rank that has most to
do. Choices are drawn, each expert once a row, since the slowest of several ranks is not one with a mean load.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexmoe.config.model import MoEConfig
from flexmoe.config.plan import ExpertPlacement
from flexmoe.config.routing import LayerLoad
from flexmoe.errors import ConfigError

_TRIALS = 8
_MOST_ROWS = 1024  # drawn; of more, experts have shares of the rows as of these; a power of two
_MOST_LAYERS = 4  # of a recording, evenly spaced


@dataclass(frozen=True, slots=True)
class Routing:
    """How likely each expert is, layer by layer: popularity[i][e], any positive scale; empty: all are as likely."""

    name: str = "uniform"
    popularity: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def recorded(cls, loads: Sequence[LayerLoad]) -> Routing:
        """As a recording counted (config/routing.py); some layers stand for all. An expert never chosen: half once."""
        step = -(-len(loads) // _MOST_LAYERS)
        layers = [tuple(max(0.5, count) for count in load.counts) for load in loads[::step]]
        return cls("recorded", tuple(layers))

    @classmethod
    def power_law(cls, num_experts: int, alpha: float, seed: int = 0) -> Routing:
        """The i-th most likely expert as likely as i to the power of -alpha; which one that is, is drawn."""
        order = np.random.default_rng(seed).permutation(num_experts)
        return cls(f"power law {alpha:g}", (tuple(float((i + 1) ** -alpha) for i in order),))

    def layers(self, num_experts: int) -> tuple[tuple[float, ...], ...]:
        """Of a model with so many experts. Raises ConfigError if the recording is of another."""
        if any(len(layer) != num_experts for layer in self.popularity):
            raise ConfigError(
                f"the routing is of layers with {len(self.popularity[0])} experts, the model has {num_experts}; "
                "use a recording of this model."
            )
        return self.popularity or ((1.0,) * num_experts,)


@dataclass(frozen=True, slots=True)
class Load:
    """What the slowest rank has, on average over layers. reached: ranks that hold an expert of a row, on average."""

    pairs: float
    active: float
    reached: float


class ExpertLoads:
    """Loads of one model's layers in one placement, for any number of rows."""

    def __init__(self, moe: MoEConfig, placement: ExpertPlacement, routing: Routing, seed: int = 0) -> None:
        self._moe, self._placement, self._seed = moe, placement, seed
        self._layers = routing.layers(moe.num_experts)
        self._is_even = not routing.popularity and placement.num_ranks == 1
        self._drawn = functools.cache(self._draw)

    def load(self, rows: int) -> Load:
        """Of a step of so many rows, of all data ranks together. Between drawn numbers of rows lie straight lines."""
        if self._is_even:
            return Load(rows * self._moe.top_k, self._moe.expected_experts(rows), 1.0)
        place = min(2 * math.log2(max(1, rows)), 2 * math.log2(_MOST_ROWS))
        below, part = int(place), place % 1
        low, high = self._drawn(below), self._drawn(below + 1 if part else below)
        pairs, active, reached = ((1 - part) * a + part * b for a, b in zip(low, high, strict=True))
        return Load(pairs * rows, active, reached)

    def _draw(self, place: int) -> tuple[float, float, float]:
        """Pairs a row, experts and ranks a row of 2 to the power of place / 2 rows."""
        rows = max(1, round(2 ** (place / 2)))
        rng = np.random.default_rng((self._seed, rows))
        found = [
            _slowest(_choose(rng, layer, rows, self._moe.top_k), self._placement)
            for layer in self._layers
            for _ in range(max(1, _TRIALS // len(self._layers)))
        ]
        pairs, active, reached = np.mean(found, axis=0).tolist()
        return pairs / rows, active, reached


@functools.lru_cache(maxsize=1024)
def expert_loads(moe: MoEConfig, placement: ExpertPlacement, routing: Routing) -> ExpertLoads:
    """Those of equal placements are drawn once, whichever plans they are in."""
    return ExpertLoads(moe, placement, routing)


def _choose(rng: np.random.Generator, popularity: Sequence[float], rows: int, top_k: int) -> npt.NDArray[np.int64]:
    """Experts of each row [T, K], without one twice: the K first of a race in which each runs by its popularity."""
    times = rng.exponential(size=(rows, len(popularity))) / np.asarray(popularity)  # [T, E]
    return np.argpartition(times, top_k - 1, axis=1)[:, :top_k]


def _slowest(chosen: npt.NDArray[np.int64], placement: ExpertPlacement) -> tuple[float, float, float]:
    """Pairs and experts of the rank with most experts to read, of equal ones most pairs; and ranks a row reaches."""
    rows = np.arange(len(chosen))[:, None]
    place = _rank_of(placement)  # [E, most replicas]
    replicas = (place >= 0).sum(axis=1)
    rank = place[chosen, rows % replicas[chosen]]  # [T, K]
    pairs = np.bincount(rank.ravel(), minlength=placement.num_ranks)
    read = np.unique(rank.ravel() * placement.num_experts + chosen.ravel()) // placement.num_experts
    active = np.bincount(read, minlength=placement.num_ranks)
    reached = len(np.unique(rank + rows * placement.num_ranks)) / len(chosen)
    slowest = max(range(placement.num_ranks), key=lambda r: (active[r], pairs[r]))
    most = pairs.argmax() if pairs.max() > 64 * max(1, active[slowest]) else slowest  # computing decides, not reading
    return float(pairs[most]), float(active[most]), reached


@functools.lru_cache(maxsize=64)
def _rank_of(placement: ExpertPlacement) -> npt.NDArray[np.int64]:
    """The ranks of each expert's replicas, -1 behind the last."""
    ranks = [[rank for rank, _ in placement.replicas(expert)] for expert in range(placement.num_experts)]
    most = max(map(len, ranks))
    return np.array([held + [-1] * (most - len(held)) for held in ranks])
