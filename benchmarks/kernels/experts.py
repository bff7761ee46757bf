"""Both halves of an expert behind each other, as a layer runs them: few rows with and without an early choice of the
down projection's experts; and from which batch grouping pays.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from expert_buffers import FEW, SHAPES, WIDTHS, Buffers, Shape, buffers, expected_bytes
from harness import Case, run
from moe_shapes import DTYPE

from flexmoe.kernels.triton import expert_down, expert_gate_up
from flexmoe.kernels.triton.combine import combine
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.kernels.triton.topk import topk


def few(shape: Shape, b: Buffers, lengths: torch.Tensor, early: bool, outputs: int, warps: int) -> None:
    """Two launches: the experts are chosen within them."""
    first = replace(expert_gate_up.default_gemv_tile(shape.hidden, DTYPE), num_warps=warps, late_trigger=early)
    second = expert_down.default_gemv_tile(shape.top_k, WIDTHS[shape.name], DTYPE)
    second = replace(second, outputs=outputs, early_ids=early)
    expert_gate_up.expert_gate_up_gemv(
        b.x, b.logits, b.ids, b.weights, b.gate_up, b.hidden,
        renormalize=shape.renormalize, lengths=lengths, tile=first, pdl=True,
    )  # fmt: skip
    expert_down.expert_down_gemv(
        b.hidden, b.ids, b.weights, b.down, b.out, logits=b.logits, lengths=lengths, tile=second, pdl=True
    )


def many(shape: Shape, b: Buffers, lengths: torch.Tensor) -> None:
    """Five launches."""
    topk(b.logits, b.ids, b.weights, renormalize=shape.renormalize, lengths=lengths, pdl=True)
    group_by_expert(b.ids, shape.experts, b.rows, b.counts, pdl=True)
    expert_gate_up.expert_gate_up_grouped(b.x, b.rows, b.counts, b.gate_up, b.hidden, top_k=shape.top_k, pdl=True)
    expert_down.expert_down_grouped(b.hidden, b.rows, b.counts, b.weights, b.down, b.y, pdl=True)
    combine(b.y, b.ids, b.out, accumulate=True, pdl=True)


def launches(shape: Shape, batch: int, layer: Callable[..., None], **options: object) -> list[Callable[[], None]]:
    """One closure for each layer."""
    lengths = torch.ones(batch, dtype=torch.int32, device="cuda")
    return [functools.partial(layer, shape, b, lengths, **options) for b in buffers(shape, batch)]


def cases() -> Iterator[Case]:
    """All models and small batches."""
    for shape, batch in itertools.product(SHAPES, (*FEW, 16)):
        name, moved = f"{shape.name} batch {batch}", expected_bytes(shape, batch, 3)
        for early, outputs, warps in itertools.product((False, True), (2, 4), (2, 4, 8)):
            options = {"early": early, "outputs": outputs, "warps": warps}
            make = functools.partial(launches, shape, batch, few, **options)
            yield Case(name, {"way": "gemv", **options}, moved, make)
        yield Case(name, {"way": "grouped"}, moved, functools.partial(launches, shape, batch, many))


if __name__ == "__main__":
    run("experts", cases())
