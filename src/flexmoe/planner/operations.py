"""What a step is made of, and the least that each operation can take. Enters: sizes. Leaves: bytes, products, seconds.

Operations have a path before their name: "fused" is what decodes go through, Triton kernels in a graph on a GPU and C
kernels on a CPU; "prompts" is what prompts go through on GPUs that have such decodes; "torch" is everything else. Rows
and shape of each:

    linear      T rows; (N, K): by a weight of N rows
    head        the same of those that sample; on a CPU greedy ones, for which kernels/cpu/screen.h reads less
    experts     pairs of a row and an expert; (A, H, F): A experts are chosen by any, of hidden size H and width F;
                results of a row added up
    attention   T rows of one query each; (keys of each, query heads, key heads, head size)
    prompt      T rows of one sequence, causal; (keys before them, query heads, key heads, head size)
    router      T rows; (E, H, K): norm, router, choice of K experts, and rows by expert; in prompts and torch all
                that a layer has beside the others

In torch attention and prompt have a fifth size: how many heads of queries and keys are normed; left out, none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flexmoe.config.machine import DeviceSpec

PATHS = ("fused", "prompts", "torch")
BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "int8": 8.5, "int4": 4.5}  # scales counted
_ALONE_FROM_KEYS = 256  # of a decode in torch, see engine/batch.py; shorter ones are gathered


@dataclass(frozen=True, slots=True)
class Work:
    """What an operation reads and computes. weights: numbers in the weights' format; numbers: in the dtype."""

    weights: float
    numbers: float
    flops: float
    launches: int = 1


@dataclass(frozen=True, slots=True)
class Beside:
    """What a path does before and after an operation: launches of their own, and the numbers that they move."""

    launches: float = 0.0
    numbers: float = 0.0


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

    def beside(self, path: str) -> Beside:
        """What comes with it on its path."""
        found = _BESIDE.get((path, self.name))
        return found(self.rows, self.shape) if found else Beside()


def roofline(operation: Operation, device: DeviceSpec, dtype: str, weights: str | None = None) -> float:
    """Seconds, if memory is read, or products are computed, as fast as the device can, and each launch costs its time.

    weights: their format if it is not the dtype.
    """
    reading, computing = _reading_computing(operation.work, device, dtype, weights)
    return operation.work.launches * device.launch_s + max(reading, computing)


def outlay(path: str, operation: Operation, device: DeviceSpec, dtype: str, weights: str | None = None) -> float:
    """Seconds that measured times are compared to: above the roofline, and nearer to its shape.

    A kernel hides reading behind products, or products behind reading, but never all of the less: the root of the sum
    of their squares, a smooth maximum. What its path launches beside it comes before or after, and hides nothing.
    """
    work, beside = operation.work, operation.beside(path)
    if (path, operation.name, device.kind) == ("fused", "head", "cpu") and weights in (None, dtype):
        weights = "int8"  # what kernels/cpu/screen.h reads of most rows
    launching = (work.launches + beside.launches) * device.launch_s
    moving = beside.numbers * BITS[dtype] / 8 / device.read_bandwidth
    return launching + moving + math.hypot(*_reading_computing(work, device, dtype, weights))


def _reading_computing(work: Work, device: DeviceSpec, dtype: str, weights: str | None) -> tuple[float, float]:
    """Seconds of each, if there were nothing else."""
    num_bytes = (work.weights * BITS[weights or dtype] + work.numbers * BITS[dtype]) / 8
    return num_bytes / device.read_bandwidth, work.flops / device.flops(dtype)


def _linear(rows: float, shape: tuple[float, ...]) -> Work:
    n, k = shape
    return Work(n * k, rows * (n + k), 2 * rows * n * k)


def _experts(rows: float, shape: tuple[float, ...]) -> Work:
    active, hidden, width = shape
    return Work(3 * active * hidden * width, rows * (4 * hidden + 2 * width), 6 * rows * hidden * width, launches=3)


def _attention(rows: float, shape: tuple[float, ...]) -> Work:
    keys, heads, kv_heads, size = shape[:4]
    return Work(0, rows * size * (2 * keys * kv_heads + 2 * heads), 4 * rows * keys * heads * size)


def _prompt(rows: float, shape: tuple[float, ...]) -> Work:
    before, heads, kv_heads, size = shape[:4]
    seen = rows * (before + (rows + 1) / 2)  # pairs of a query and a key
    return Work(0, size * (2 * (before + rows) * kv_heads + 2 * rows * heads), 4 * seen * heads * size)


def _router(rows: float, shape: tuple[float, ...]) -> Work:
    experts, hidden, _ = shape
    return Work(experts * hidden, rows * (3 * hidden + 2 * experts), 2 * rows * experts * hidden, launches=3)


_WORK: Mapping[str, Callable[[float, tuple[float, ...]], Work]] = {
    "linear": _linear, "head": _linear, "experts": _experts, "attention": _attention, "prompt": _prompt,
    "router": _router,
}  # fmt: skip

# Counted in the code of each path, in 16-bit numbers: one of 32 bits that stands between two launches counts twice.

_NORM = Beside(8, 18)  # kernels/rms_norm.py in torch: launches, and numbers for each one normed
_ROTATE = Beside(3, 7)  # kernels/rotary.py, likewise


def _torch_attention(rows: float, shape: tuple[float, ...], attending: float) -> Beside:
    """layers/attention.py between its products: norm, rotation, cache, and `attending` launches of attention proper."""
    _, heads, kv_heads, size, *normed = shape
    launches = _ROTATE.launches + 2 + attending - 1  # one is the operation's own
    numbers = _ROTATE.numbers * (heads + kv_heads) + 4 * kv_heads + 2 * heads  # to the cache; results copied
    if sum(normed):
        launches += 2 * _NORM.launches + 1
        numbers += (_NORM.numbers + 2) * sum(normed)
    return Beside(launches, rows * size * numbers)


def _torch_prompt(rows: float, shape: tuple[float, ...]) -> Beside:
    """Attended in one launch, and copied."""
    return _torch_attention(rows, shape, 2)


def _torch_decodes(rows: float, shape: tuple[float, ...]) -> Beside:
    """Long rows are attended one by one: launches that cut the keys and merge, and one that copies."""
    return _torch_attention(rows, shape, 3 * (rows if shape[0] >= _ALONE_FROM_KEYS else 1))


def _torch_rest(rows: float, shape: tuple[float, ...]) -> Beside:
    """Two norms, two sums, and the router in 32 bits with a sort in place of a choice."""
    _, hidden, _ = shape
    return Beside(2 * _NORM.launches + 9, rows * hidden * (2 * _NORM.numbers + 8))


def _prompts_rest(rows: float, shape: tuple[float, ...]) -> Beside:
    """models/fused_prompts.py: some 4 for rotation and cache, then a sum and a norm behind attention and K experts."""
    _, hidden, top_k = shape
    return Beside(3, rows * hidden * (4 + 6 + top_k + 5))


_BESIDE: Mapping[tuple[str, str], Callable[[float, tuple[float, ...]], Beside]] = {
    ("torch", "prompt"): _torch_prompt, ("torch", "attention"): _torch_decodes, ("torch", "router"): _torch_rest,
    ("prompts", "router"): _prompts_rest,
}  # fmt: skip
