"""What a step is made of, and the least that each operation can take. Enters: sizes. Leaves: bytes, products, seconds.

Operations have a path before their name: "fused" is what decodes go through, Triton kernels in a graph on a GPU and C
kernels on a CPU; "prompts" is what prompts go through on GPUs that have such decodes; "torch" is everything else. Rows
and shape of each:

    linear      T rows; (N, K): by a weight of N rows
    experts     pairs of a row and an expert; (A, H, F): A experts are chosen by any, of hidden size H and width F;
                results of a row added up
    attention   T rows of one query each; (keys of each, query heads, key heads, head size)
    prompt      T rows of one sequence, causal; (keys before them, query heads, key heads, head size)
    router      T rows; (E, H, K): norm, router, choice of K experts, and rows by expert; in prompts and torch all
                that a layer has beside the others
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flexmoe.config.machine import DeviceSpec

PATHS = ("fused", "prompts", "torch")
BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "int8": 8.5, "int4": 4.5}  # scales counted


@dataclass(frozen=True, slots=True)
class Work:
    """What an operation reads and computes. weights: numbers in the weights' format; numbers: in the dtype."""

    weights: float
    numbers: float
    flops: float
    launches: int = 1


@dataclass(frozen=True, slots=True)
class Operation:
    """One to be priced; see the module for what rows and shape mean."""

    name: str
    rows: float
    shape: tuple[float, ...]

    @property
    def work(self) -> Work:
        """What it has to do."""
        return _WORK[self.name](self.rows, self.shape)


def roofline(operation: Operation, device: DeviceSpec, dtype: str, weights: str | None = None) -> float:
    """Seconds, if memory is read, or products are computed, as fast as the device can, and each launch costs its time.

    weights: their format if it is not the dtype.
    """
    work = operation.work
    num_bytes = (work.weights * BITS[weights or dtype] + work.numbers * BITS[dtype]) / 8
    return work.launches * device.launch_s + max(num_bytes / device.read_bandwidth, work.flops / device.flops(dtype))


def _linear(rows: float, shape: tuple[float, ...]) -> Work:
    n, k = shape
    return Work(n * k, rows * (n + k), 2 * rows * n * k)


def _experts(rows: float, shape: tuple[float, ...]) -> Work:
    active, hidden, width = shape
    return Work(3 * active * hidden * width, rows * (4 * hidden + 2 * width), 6 * rows * hidden * width, launches=3)


def _attention(rows: float, shape: tuple[float, ...]) -> Work:
    keys, heads, kv_heads, size = shape
    return Work(0, rows * size * (2 * keys * kv_heads + 2 * heads), 4 * rows * keys * heads * size)


def _prompt(rows: float, shape: tuple[float, ...]) -> Work:
    before, heads, kv_heads, size = shape
    seen = rows * (before + (rows + 1) / 2)  # pairs of a query and a key
    return Work(0, size * (2 * (before + rows) * kv_heads + 2 * rows * heads), 4 * seen * heads * size)


def _router(rows: float, shape: tuple[float, ...]) -> Work:
    experts, hidden, _ = shape
    return Work(experts * hidden, rows * (3 * hidden + 2 * experts), 2 * rows * experts * hidden, launches=3)


_WORK: Mapping[str, Callable[[float, tuple[float, ...]], Work]] = {
    "linear": _linear, "experts": _experts, "attention": _attention, "prompt": _prompt, "router": _router,
}  # fmt: skip
