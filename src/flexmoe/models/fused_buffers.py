"""What decode steps compute in: activations and scratch, shared by all layers. Enters: shapes. Leaves: tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.kernels.triton import norm_linear
from flexmoe.kernels.triton.decode_attention import workspace_shapes
from flexmoe.models.fused_tiles import StepTiles


class Buffers:
    """Activations and scratch of the largest step; all layers share them. Those of T rows are the first T."""

    def __init__(
        self,
        config: ModelConfig,
        linears: Iterable[tuple[int, int]],
        slots: int,
        tiles: StepTiles,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int,
        seen_rows: int,
    ) -> None:
        """config: with the widths of this rank. linears: (N, K) of all dense projections. slots: of a layer at most.

        seen_rows: that experts see at most, those of all data ranks.
        """

        def empty(*shape: int, dtype: torch.dtype = dtype, rows: int = max_rows) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        a = config.attention
        self.x = empty(config.hidden_size, dtype=torch.float32)  # the residual stream
        self.normed = empty(config.hidden_size)
        self.qkv = empty(config.qkv_size)
        self.attended = empty(a.num_heads * a.head_dim)
        self.token_ids = empty(dtype=torch.int64)
        if config.moe is not None:
            m, layers = config.moe, sum(layer.is_moe for layer in config.layers)
            self.router_logits = empty(m.num_experts, dtype=torch.float32, rows=seen_rows)
            self.topk_ids = torch.empty(layers, seen_rows, m.top_k, dtype=torch.int32, device=device)
            self.slot_ids = empty(m.top_k, dtype=torch.int32, rows=seen_rows)
            self.topk_weights = empty(m.top_k, dtype=torch.float32, rows=seen_rows)
            self.hidden = empty(m.top_k, m.expert_width, rows=seen_rows)
            self.expert_out = empty(m.top_k, config.hidden_size, rows=seen_rows)
            self.grouped = torch.empty(slots * seen_rows, dtype=torch.int32, device=device)
            self.counts = torch.empty(slots, dtype=torch.int32, device=device)
        steps = range(1, max_rows + 1)
        size = max(
            norm_linear.scratch_bytes(t, n, k, dtype, norm=norm, tile=tiles.linear(t, n, k, norm=norm))
            for t, (n, k), norm in itertools.product(steps, linears, (False, True))
        )
        self.scratch = torch.empty(size, dtype=torch.uint8, device=device)
        parts = max(t * tiles.attention(t, long=long).splits for t in steps for long in (False, True))  # of one head
        partial, logsum = workspace_shapes(parts, a.num_heads, a.head_dim, 1)
        self.attention = (
            torch.empty(partial, dtype=torch.float32, device=device),
            torch.empty(logsum, dtype=torch.float32, device=device),
        )
