"""What the benchmarks of experts share: buffers of a model's shape, enough of them that no cache holds the weights."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import torch
from moe_shapes import DTYPE, SHAPES, Shape, random_choices
from torch import Tensor

from flexmoe.kernels.triton.group_by_expert import group_by_expert

WIDTHS = {"Mixtral": 14336, "Qwen3-30B": 768, "OLMoE": 1024, "TinyMistral": 4096}
FEW, MANY = (1, 2, 4, 8), (4, 8, 16, 32, 64, 128, 256, 2048, 8192)
SHARED_MEMORY = 227 * 1024  # bytes a program may have
_ROTATE = 160 * 10**6  # bytes, more than twice the L2 cache


@dataclass(frozen=True)
class Buffers:
    """One layer's inputs and outputs for a batch of T rows."""

    x: Tensor  # [T, H]
    logits: Tensor  # [T, E]
    ids: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    rows: Tensor  # [E, T]
    counts: Tensor  # [E]
    gate_up: Tensor  # [E, 2F, H]
    hidden: Tensor  # [T*K, F]
    down: Tensor  # [E, H, F]
    y: Tensor  # [T*K, H]
    out: Tensor  # [T, H] fp32


_lock = threading.Lock()  # cases are compiled in several threads, and one set of weights is enough


@functools.lru_cache(maxsize=1)
def _experts(shape: Shape, layers: int) -> list[tuple[Tensor, Tensor]]:
    H, F, E = shape.hidden, WIDTHS[shape.name], shape.experts
    sizes = ((E, 2 * F, H), (E, H, F))
    return [
        tuple(torch.empty(size, dtype=DTYPE, device="cuda").normal_(std=0.02) for size in sizes) for _ in range(layers)
    ]  # type: ignore[misc]


def touched(shape: Shape, batch: int) -> float:
    """How many experts a batch is expected to choose, if all are equally likely."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)


def expected_bytes(shape: Shape, batch: int, matrices: int) -> int:
    """Bytes of `matrices` of an expert's three that a batch is expected to touch, with its rows on both sides."""
    H, F = shape.hidden, WIDTHS[shape.name]
    rows = batch * (H + shape.top_k * F)
    return int((touched(shape, batch) * matrices * H * F + rows) * DTYPE.itemsize)


def buffers(shape: Shape, batch: int) -> list[Buffers]:
    """Sets with the same weights where these alone exceed the cache, else with those of several layers."""
    H, F, E, K = shape.hidden, WIDTHS[shape.name], shape.experts, shape.top_k
    per_layer = touched(shape, batch) * H * F * DTYPE.itemsize
    with _lock:
        layers = _experts(shape, max(2, -(-_ROTATE // int(per_layer))))
    made = []
    for gate_up, down in layers:
        ids = random_choices(shape, batch)
        logits = torch.randn(batch, E, device="cuda").scatter_(1, ids.long(), 9 + torch.rand(batch, K, device="cuda"))
        rows = torch.empty(E, batch, dtype=torch.int32, device="cuda")
        counts = torch.empty(E, dtype=torch.int32, device="cuda")
        group_by_expert(ids, E, rows, counts)
        x, hidden = (torch.randn(n, width, device="cuda").to(DTYPE) for n, width in ((batch, H), (batch * K, F)))
        weights = torch.rand(batch, K, device="cuda")
        y, out = torch.empty(batch * K, H, dtype=DTYPE, device="cuda"), torch.zeros(batch, H, device="cuda")
        made.append(Buffers(x, logits, ids, weights, rows, counts, gate_up, hidden, down, y, out))
    return made


__all__ = ["FEW", "MANY", "SHAPES", "SHARED_MEMORY", "WIDTHS", "Buffers", "Shape", "buffers", "expected_bytes"]
