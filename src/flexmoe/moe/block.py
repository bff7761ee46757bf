"""The MoE layer: route -> dispatch -> experts -> combine. READ THIS FIRST.

T tokens, H hidden size, E logical experts, K experts a token. The router names K logical experts for each token; the
dispatcher brings each token to where those experts live and names them as physical slots there (WHERE); the expert
backend computes the weighted sum of the experts' outputs for the rows it got (HOW); the dispatcher brings the sums
back and adds those that belong to one token. Any dispatcher works with any backend.

The shared expert, which every token takes, goes along: `own` gives the rows that this rank computes it for, and
`combine` adds it before the ranks' results are put together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ExpertPlacement
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.linear import Linear
from flexmoe.layers.mlp import GatedMLP
from flexmoe.moe.dispatch import make_dispatcher
from flexmoe.moe.experts import make_experts
from flexmoe.moe.router import Router
from flexmoe.parallel.mesh import Mesh


class MoEBlock(nn.Module):
    """[T, H] -> [T, H]."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        placement: ExpertPlacement,
        backend: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        mesh: Mesh,
    ) -> None:
        """config: with the widths of this rank."""
        super().__init__()
        moe = config.moe
        assert moe is not None, f"layer {layer} is not a MoE layer"
        self.layer = layer
        self.router = Router(config.hidden_size, moe, device=device)
        self.dispatcher = make_dispatcher(placement, mesh, device)
        num_slots = len(placement.local_slots(mesh.place.ep))
        self.experts = make_experts(
            backend, num_slots, config.hidden_size, moe.expert_width, dtype=dtype, device=device
        )
        self.shared: GatedMLP | None = None
        self.shared_gate: Linear | None = None
        if moe.shared_width:
            self.shared = GatedMLP(config.hidden_size, moe.shared_width, dtype=dtype, device=device)
        if moe.shared_gate:
            self.shared_gate = Linear(config.hidden_size, 1, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor, probe: Probe | None = None, most_rows: int | None = None) -> Tensor:
        """most_rows: T of the data rank that has most, if there are several."""
        topk_ids, topk_weights = self.router(x)  # [T, K], [T, K] fp32
        if probe is not None:
            probe.record("topk_ids", self.layer, topk_ids)
            probe.record("topk_weights", self.layer, topk_weights)
        routed = self.dispatcher.dispatch(x, topk_ids, topk_weights, most_rows)
        out = self.experts(routed.x, routed.slot_ids, routed.weights)  # one weighted sum a row
        shared = None if self.shared is None else self.shared_output(self.dispatcher.own(x))
        return self.dispatcher.combine(out, routed, shared)  # [T, H]

    def shared_output(self, x: Tensor) -> Tensor:
        """Of the expert that every token takes, scaled by its gate where the model has one."""
        assert self.shared is not None
        out: Tensor = self.shared(x)
        return out if self.shared_gate is None else out * torch.sigmoid(self.shared_gate(x))
