"""FusedExperts: router and experts of a MoE layer in decode steps. Enters: normed rows. Leaves: what the experts give.

With few rows every (token, expert) pair reads its expert for itself; with more, rows are grouped by expert and meet it
in one product. The rows are this rank's own, or those of all data ranks; experts that are elsewhere are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.kernels.triton.combine import combine, combine_norm
from flexmoe.kernels.triton.expert_down import expert_down_gemv
from flexmoe.kernels.triton.expert_gate_up import expert_gate_up_gemv
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.kernels.triton.norm_linear import NormAfter
from flexmoe.kernels.triton.route import norms_first, route
from flexmoe.kernels.triton.topk import topk
from flexmoe.kernels.triton.topk_by_expert import topk_by_expert
from flexmoe.models.decoder import DecoderLayer
from flexmoe.models.fused_buffers import Buffers
from flexmoe.models.fused_grouped import compute_grouped
from flexmoe.models.fused_ranks import slots_by_row
from flexmoe.models.fused_tiles import StepTiles
from flexmoe.moe.block import MoEBlock
from flexmoe.parallel.mesh import Mesh


class FusedExperts:
    """Of one layer, over the shared buffers; T rows are the first T of those that are for experts."""

    def __init__(
        self, layer: DecoderLayer, moe: MoEBlock, config: ModelConfig, buffers: Buffers, tiles: StepTiles, mesh: Mesh,
        *, pdl: bool,
    ) -> None:  # fmt: skip
        """config: with the widths of this rank."""
        self._moe, self._norm, self._buffers, self._tiles, self._pdl = moe, layer.mlp_norm, buffers, tiles, pdl
        self._router = narrowest(moe.router.weight.data, buffers.normed.dtype)
        slots = slots_by_row(mesh, len(self._router), layer.index, buffers.x.device)
        self._slots = None if slots is None else slots.rows(len(buffers.router_logits))
        self.ids = buffers.topk_ids[sum(before.is_moe for before in config.layers[: layer.index])]

    def norms_first(self, rows: int) -> bool:
        """Whether so many rows are normed in a launch of its own, which may have been done before."""
        return norms_first(self._tiles.route(rows, self._router))

    def route(self, x: Tensor, normed: Tensor, *, is_normed: bool, pdl: bool) -> None:
        """The router's logits of x fp32 [T, H], and normed [T, H]. is_normed: that is there; x only gives the shape."""
        norm, count = self._norm, len(normed)
        route(
            x, norm.weight.data, norm.eps, self._router, normed, self._buffers.router_logits[:count],
            is_normed=is_normed, tile=self._tiles.route(count, self._router), pdl=pdl,
        )  # fmt: skip

    def add(
        self, normed: Tensor, lengths: Tensor, out: Tensor, *, accumulate: bool, then: NormAfter | None = None
    ) -> bool:
        """What the experts here give for the routed rows, to out [T, H]: added to it, or by itself.

        lengths: int32 [T], 0 of padding. then: the norm that `out` is for next, with accumulate. Returns whether it is
        done.
        """
        if not len(self._moe.experts.gate_up):  # all are on other ranks, but choices are looked at here, too
            out.zero_()
            self._choose(lengths)
        elif self._tiles.reads_alone(len(lengths)):
            self._add_alone(normed, lengths, out, accumulate=accumulate)
        else:
            places = self._compute_grouped(normed, lengths)
            results = self._buffers.expert_out[: len(lengths)].flatten(0, 1)
            if then is not None:
                combine_norm(results, places, out, then.weight, then.eps, then.out, pdl=self._pdl)
                return True
            combine(results, places, out, accumulate=accumulate, pdl=self._pdl)
        return False

    def _add_alone(self, normed: Tensor, lengths: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """Each (token, expert) pair by itself; experts are chosen within the first launch."""
        b, count, pdl, slots, moe = self._buffers, len(lengths), self._pdl, self._slots, self._moe
        logits, ids, weights = b.router_logits[:count], self.ids[:count], b.topk_weights[:count]
        places = ids if slots is None else b.slot_ids[:count]
        hidden = b.hidden[:count].flatten(0, 1)
        first, second = self._tiles.few_experts(count, in_order=slots is None)
        expert_gate_up_gemv(
            normed, logits, ids, weights, moe.experts.gate_up.data, hidden, slots=slots, slot_ids=places,
            renormalize=moe.router.renormalize, lengths=lengths, tile=first, pdl=pdl,
        )  # fmt: skip
        expert_down_gemv(
            hidden, places, weights, moe.experts.down.data, out, logits=logits, lengths=lengths,
            accumulate=accumulate, tile=second, pdl=pdl,
        )  # fmt: skip

    def _compute_grouped(self, normed: Tensor, lengths: Tensor) -> Tensor:
        """Rows of one expert together, each (token, expert) pair by itself to `expert_out`; returns where they are."""
        b, count, pdl, experts = self._buffers, len(lengths), self._pdl, self._moe.experts
        hidden, rows_out = b.hidden[:count].flatten(0, 1), b.expert_out[:count].flatten(0, 1)
        weights, slots, counts = b.topk_weights[:count], experts.num_slots, b.counts
        grouped = b.grouped[: slots * count].view(slots, count)
        if self._slots is None and self._tiles.groups_in_one(count, slots):
            places = self.ids[:count]
            topk_by_expert(
                b.router_logits[:count], places, weights, grouped, counts, renormalize=self._moe.router.renormalize,
                lengths=lengths, pdl=pdl,
            )  # fmt: skip
        else:
            places = self._choose(lengths)
            group_by_expert(places, slots, grouped, counts, pdl=pdl)
        compute_grouped(self._tiles, experts, normed, grouped, counts, weights, hidden, rows_out, pdl=pdl)
        return places

    def _choose(self, lengths: Tensor) -> Tensor:
        """Each row's experts; returns where they are, int32 [T, K], -1 if elsewhere."""
        b, count, slots = self._buffers, len(lengths), self._slots
        ids = self.ids[:count]
        places = ids if slots is None else b.slot_ids[:count]
        topk(
            b.router_logits[:count], ids, b.topk_weights[:count], renormalize=self._moe.router.renormalize,
            lengths=lengths, slots=slots, slot_ids=places, pdl=self._pdl,
        )  # fmt: skip
        return places


def narrowest(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 weight in `dtype` if that loses nothing, as where the checkpoint had it so; else as it is."""
    narrow = weight.to(dtype)
    return narrow if torch.equal(narrow.float(), weight) else weight
