"""What experts make of rows that are grouped by them. Enters: normed rows, and who chose whom. Leaves: a row a choice.

Where experts have dozens of rows each, on Hopper: kernels of its own (`kernels/hopper`); else Triton's, cut by rows.
All take rows from where they are, but for wide tiles of the widest experts: those get copies, side by side.
"""

from __future__ import annotations

from torch import Tensor

from flexmoe.kernels.triton import expert_down, expert_gate_up
from flexmoe.kernels.triton.copy_by_expert import copy_by_expert
from flexmoe.models.fused_tiles import StepTiles
from flexmoe.moe.experts.weights import ExpertWeights


def compute_grouped(
    tiles: StepTiles, experts: ExpertWeights, normed: Tensor, rows: Tensor, counts: Tensor, weights: Tensor,
    hidden: Tensor, y: Tensor, *, pdl: bool = False,
) -> None:  # fmt: skip
    """y [T K, H]: row a is weights[a] times what a's expert makes of its row of normed [T, H].

    rows int32 [S, capacity], counts int32 [S]: see `group_by_expert`. weights: fp32 [T, K]. hidden [T K, F]: scratch.
    Choices that no slot here has get no row.
    """
    top_k = weights.shape[1]
    expert_gate_up_grouped(tiles, normed, rows, counts, experts.gate_up.data, hidden, top_k=top_k, pdl=pdl)
    expert_down_grouped(tiles, hidden, rows, counts, weights, experts.down.data, y, pdl=pdl)


def expert_gate_up_grouped(
    tiles: StepTiles, normed: Tensor, rows: Tensor, counts: Tensor, gate_up: Tensor, hidden: Tensor, *, top_k: int,
    pdl: bool,
) -> None:  # fmt: skip
    """The first half; hidden is for the second half alone, its order depends on the kernel."""
    products = tiles.products(len(normed))
    if products is not None:
        shape = tiles.gate_up_shape(len(normed))
        if shape == "wide":
            copied = normed.new_empty(len(hidden), normed.shape[1])
            copy_by_expert(normed, rows, counts, copied, top_k=top_k, pdl=pdl)
            normed = copied
        products.gate_up(normed, rows, counts, gate_up, hidden, top_k=top_k, shape=shape, pdl=pdl)
    else:
        tile, _ = tiles.many_experts(len(normed))
        expert_gate_up.expert_gate_up_grouped(normed, rows, counts, gate_up, hidden, top_k=top_k, tile=tile, pdl=pdl)


def expert_down_grouped(
    tiles: StepTiles, hidden: Tensor, rows: Tensor, counts: Tensor, weights: Tensor, down: Tensor, y: Tensor, *,
    pdl: bool,
) -> None:  # fmt: skip
    """The second half."""
    products = tiles.products(len(weights))
    if products is not None:
        products.down(hidden, rows, counts, weights, down, y, shape=tiles.down_shape(len(weights)), pdl=pdl)
    else:
        _, tile = tiles.many_experts(len(weights))
        expert_down.expert_down_grouped(hidden, rows, counts, weights, down, y, tile=tile, pdl=pdl)
