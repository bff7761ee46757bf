"""Attention: project, norm, rotate, write the cache, attend, project back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexmoe.config.model import ModelConfig
from flexmoe.kernels.paged_attention import paged_attention
from flexmoe.kernels.rotary import apply_rotary
from flexmoe.layers.forward_batch import ForwardBatch
from flexmoe.layers.linear import Linear
from flexmoe.layers.norm import RMSNorm, mean_squares
from flexmoe.parallel.comm import Group


class Attention(nn.Module):
    """Grouped-query attention of one layer: [T, H] -> [T, H]. Hq query heads, Hkv key heads, D their size.

    config: with the heads of this rank. group: the ranks that share the heads; kv_replicas of them hold the same Hkv.
    """

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: Group | None = None,
        kv_replicas: int = 1,
    ) -> None:
        super().__init__()
        self._group, self._kv_replicas = group or Group(), kv_replicas
        a = config.attention
        self.config = a
        self.window = window
        self.num_heads, self.num_kv_heads, self.head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        self.qkv = Linear(config.hidden_size, config.qkv_size, bias=a.qkv_bias, dtype=dtype, device=device)
        self.out = Linear(q_size, config.hidden_size, bias=a.out_bias, dtype=dtype, device=device, summed=group)
        if a.qk_norm != "none":
            sizes = (a.head_dim, a.head_dim) if a.qk_norm == "head" else (q_size, kv_size)
            self.q_norm = RMSNorm(sizes[0], config.norm_eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(sizes[1], config.norm_eps, dtype=dtype, device=device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, batch: ForwardBatch) -> Tensor:
        rows = x.shape[0]
        qkv = self.norm(self.qkv(x))  # [T, (Hq + 2 Hkv) D]
        if self.config.clip_qkv is not None:
            qkv = qkv.clamp_(-self.config.clip_qkv, self.config.clip_qkv)
        heads = qkv.view(rows, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        rotated = apply_rotary(heads[:, : -self.num_kv_heads], cos, sin)  # [T, Hq + Hkv, D]
        cache[:, 0].index_copy_(0, batch.slot_mapping, rotated[:, self.num_heads :])
        cache[:, 1].index_copy_(0, batch.slot_mapping, heads[:, -self.num_kv_heads :])
        out = paged_attention(rotated[:, : self.num_heads], cache, batch.attention[self.window])
        return self.out(out.flatten(1))  # type: ignore[no-any-return]

    def norm(self, qkv: Tensor) -> Tensor:
        """Queries and keys normed, where the model does that: [T, (Hq + 2 Hkv) D]."""
        if self.config.qk_norm == "none":
            return qkv
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        query, key, value = qkv.split((q_size, kv_size, kv_size), -1)
        if self.config.qk_norm == "head":
            query, key = (t.unflatten(-1, (-1, self.head_dim)) for t in (query, key))
        elif self._group.size > 1:
            of_query, of_key = mean_squares((query, key), (1, self._kv_replicas), self._group)
            return torch.cat((self.q_norm.scaled(query, of_query), self.k_norm.scaled(key, of_key), value), -1)
        return torch.cat((self.q_norm(query).flatten(1), self.k_norm(key).flatten(1), value), -1)
