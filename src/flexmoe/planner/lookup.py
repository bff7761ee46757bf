"""What an operation takes on a machine. Enters: measured samples. Leaves: seconds for sizes that nobody measured.

Not seconds are interpolated but the ratio to the roofline, which changes far less with size. A plane is laid through
all samples on logarithmic scales of ratio, rows and sizes; near ones weigh more, and what was measured bounds it. Where
none is near, the result says that it is extrapolated; where there is no sample at all, the ratio is that of `_GUESS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexmoe.config.machine import DeviceSpec, Machine, Sample
from flexmoe.planner.operations import Operation, roofline

Array = npt.NDArray[np.float64]

_GUESS = 1.25
_FAR = math.log(8)  # of a size from that of the nearest sample
_ALIKE = {"prompts.linear": "torch.linear", "prompts.experts": "torch.experts"}  # the same kernels on a GPU
_SHARP = 3  # power of the distance by which weights fall
_FLAT = 0.03  # what a slope costs: where all samples have one size, nothing else says that there is none


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds, and whether they reach beyond what was measured."""

    seconds: float
    extrapolated: bool


@dataclass(frozen=True, slots=True)
class _Known:
    """Samples of one operation: where each is [N, D], and the logarithm of its ratio to the roofline [N]."""

    places: Array
    ratios: Array


class Lookup:
    """Prices operations of one dtype on one machine. ranks: how many share a CPU at once."""

    def __init__(self, machine: Machine, dtype: str, weights: str | None = None, ranks: int = 1) -> None:
        self._device, self._dtype, self._weights = machine.device, dtype, weights
        self._share = 1.0
        samples = [s for s in machine.samples if s.dtype == (weights or dtype)]
        if machine.is_shared:
            measured = _nearest({s.ranks for s in samples}, ranks)
            samples = [s for s in samples if s.ranks == measured]
            self._share = ranks / measured
        self._known = {op: _known(group, self._device, dtype) for op, group in _by_op(samples).items()}
        self._found: dict[tuple[str, Operation], Estimate] = {}

    def estimate(self, path: str, operation: Operation) -> Estimate:
        """Of one operation on its path."""
        key = path, operation
        if key not in self._found:
            self._found[key] = self._estimate(path, operation)
        return self._found[key]

    def _estimate(self, path: str, operation: Operation) -> Estimate:
        least = roofline(operation, self._device, self._dtype, self._weights) * self._share
        name = f"{path}.{operation.name}"
        known = self._known.get(name) or self._known.get(_ALIKE.get(name, ""))
        if known is None:
            return Estimate(least * _GUESS, True)
        gaps = known.places - _place(operation)  # [N, D]
        weights = 1 / (np.sqrt((gaps**2).sum(axis=1)) + 1e-3) ** _SHARP
        ratio = _level(gaps, known.ratios, weights / weights.sum())
        return Estimate(least * math.exp(ratio), bool(np.abs(gaps).max(axis=1).min() > _FAR))


def _level(gaps: Array, ratios: Array, weights: Array) -> float:
    """Where the plane through `ratios` [N] stands at gap 0, within what was measured. gaps: [N, D]; weights: [N]."""
    sides = np.column_stack([np.ones(len(gaps)), gaps])
    weighted = sides * weights[:, None]
    slopes = np.diag([0.0] + [_FLAT] * gaps.shape[1])
    level = np.linalg.solve(weighted.T @ sides + slopes, weighted.T @ ratios)[0]
    return float(np.clip(level, ratios.min(), ratios.max()))


def _by_op(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.op, []).append(sample)
    return found


def _known(samples: Sequence[Sample], device: DeviceSpec, dtype: str) -> _Known:
    operations = [Operation(s.op.partition(".")[2], s.rows, s.shape) for s in samples]
    ratios = [
        math.log(s.seconds / roofline(o, device, dtype, s.dtype)) for s, o in zip(samples, operations, strict=True)
    ]
    return _Known(np.array([_place(o) for o in operations]), np.array(ratios))


def _place(operation: Operation) -> Array:
    """Where an operation is among others, on logarithmic scales."""
    return np.array([math.log(max(1, size)) for size in (operation.rows, *operation.shape)])


def _nearest(numbers: Iterable[int], wanted: int) -> int:
    return min(numbers, key=lambda n: abs(math.log(n / wanted)), default=1)
