"""What an operation takes on a machine. Enters: measured samples. Leaves: seconds for sizes that nobody measured.

Not seconds are interpolated but their ratio to `operations.outlay`, which changes far less with size: by kriging
(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 2.7), on logarithmic scales of ratio,
rows and sizes. What was measured comes back, bounds all that is estimated, and tells the less the further away it is.
Where none is near, the result says that it is extrapolated; where there is no sample at all, the ratio to the roofline
is that of `_GUESS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexmoe.config.machine import DeviceSpec, Machine, Sample
from flexmoe.planner.operations import PATHS, Operation, outlay, roofline

Array = npt.NDArray[np.float64]

_GUESS = 1.25
_FAR = math.log(8)  # of a size from that of the nearest sample
# What tells of an operation that was not measured itself: the same kernels.
_ALIKE = {
    "prompts.linear": ("torch.linear",), "prompts.experts": ("torch.experts",),
    **{f"{path}.head": (f"{path}.linear", "torch.linear") for path in PATHS},
}  # fmt: skip
# How ratios of an operation differ, as standard deviations of their logarithms; all operations and machines are alike.
_LEVEL = 10.0  # all of them together: as good as unknown
_SLOPE = 0.25  # with each size, for each factor of e: a plane
_BENT = 0.5  # from that plane, with sizes that are `_FAR` apart
_NOISE = 0.005  # one measurement's


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds, and whether they reach beyond what was measured."""

    seconds: float
    extrapolated: bool


class _Known:
    """Samples of one operation: where each is [N, D], and the logarithm of its ratio [N]."""

    def __init__(self, places: Array, ratios: Array) -> None:
        self._middle = places.mean(axis=0)
        self._places, self._ratios = places - self._middle, ratios
        noise = _NOISE**2 * np.eye(len(ratios))
        self._weights = np.linalg.solve(_covariance(self._places, self._places) + noise, ratios)

    def at(self, place: Array) -> tuple[float, bool]:
        """The logarithm of the ratio at a place [D], within what was measured; and whether that is far from there."""
        place = place - self._middle
        expected = _covariance(place[None], self._places)[0] @ self._weights
        gap = np.abs(self._places - place).max(axis=1).min()
        return float(np.clip(expected, self._ratios.min(), self._ratios.max())), bool(gap > _FAR)


def _covariance(some: Array, others: Array) -> Array:
    """How much ratios at some places [N, D] tell of those at others [M, D]: [N, M]."""
    apart = np.sqrt(((some[:, None] - others) ** 2).sum(axis=-1))
    found: Array = _LEVEL**2 + _SLOPE**2 * some @ others.T + _BENT**2 * np.exp(-apart / _FAR)
    return found


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
        self._samples = _by_op(samples)
        self._known: dict[str, _Known] = {}
        self._found: dict[tuple[str, Operation], Estimate] = {}

    def estimate(self, path: str, operation: Operation) -> Estimate:
        """Of one operation on its path."""
        key = path, operation
        if key not in self._found:
            self._found[key] = self._estimate(path, operation)
        return self._found[key]

    def _estimate(self, path: str, operation: Operation) -> Estimate:
        named = f"{path}.{operation.name}"
        op = next((op for op in (named, *_ALIKE.get(named, ())) if op in self._samples), None)
        if op is None:
            least = roofline(operation, self._device, self._dtype, self._weights)
            return Estimate(least * self._share * _GUESS, True)
        if op not in self._known:
            self._known[op] = _known(self._samples[op], self._device, self._dtype)
        ratio, is_far = self._known[op].at(_place(operation))
        costs = outlay(path, operation, self._device, self._dtype, self._weights)
        return Estimate(costs * self._share * math.exp(ratio), is_far)


def _by_op(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.op, []).append(sample)
    return found


def _known(samples: Sequence[Sample], device: DeviceSpec, dtype: str) -> _Known:
    places, ratios = [], []
    for sample in samples:
        path, _, name = sample.op.partition(".")
        operation = Operation(name, sample.rows, sample.shape)
        places.append(_place(operation))
        ratios.append(math.log(sample.seconds / outlay(path, operation, device, dtype, sample.dtype)))
    return _Known(np.array(places), np.array(ratios))


def _place(operation: Operation) -> Array:
    """Where an operation is among others, on logarithmic scales. Norms are no size: `outlay` counts them."""
    return np.array([math.log(max(1, size)) for size in (operation.rows, *operation.shape[:4])])


def _nearest(numbers: Iterable[int], wanted: int) -> int:
    return min(numbers, key=lambda n: abs(math.log(n / wanted)), default=1)
