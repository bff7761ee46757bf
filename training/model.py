"""The Mixtral architecture written for training: all experts run as one dense product.

In: token ids [B, T]. Out: logits [B, T, V] and what the router did. The function computed is Mixtral's (top-2 of the
softmax, renormalised): the columns of unselected experts are multiplied by zero. At an expert width of 128 one wide
product is several times faster than moving tokens to their experts, and it compiles.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model, under the names of Hugging Face's MixtralConfig."""

    vocab_size: int = 8192
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 64
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    intermediate_size: int = 128
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def as_dict(self) -> dict[str, float]:
        """The sizes as JSON knows them."""
        return asdict(self)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; each key-value head serves a group of query heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]; cos and sin [T, D]."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # [B, heads, T, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return F.linear(out, self.o_proj.weight)


class Experts(nn.Module):
    """Router and experts of one layer. Columns e * I to (e + 1) * I of `w1` and `w3` belong to expert e."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.experts, self.top_k = shape.num_local_experts, shape.num_experts_per_tok
        width = self.experts * shape.intermediate_size
        self.gate = nn.Linear(shape.hidden_size, self.experts, bias=False)
        self.w1 = nn.Linear(shape.hidden_size, width, bias=False)
        self.w3 = nn.Linear(shape.hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, H] -> output [B, T, H], balance loss [], router z-loss [], share of the choices per expert [E]."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight.float())  # [B, T, E]
            probabilities = logits.softmax(-1)
        top, ids = probabilities.topk(self.top_k, -1)  # [B, T, K]
        top = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(-1, ids, top)  # [B, T, E]
        up = F.silu(self.w1(x)) * self.w3(x)  # [B, T, E * I]
        up = up.unflatten(-1, (self.experts, -1)) * weights.unsqueeze(-1).to(up.dtype)
        chosen = torch.zeros_like(probabilities).scatter(-1, ids, 1.0)
        load = chosen.mean((0, 1)) / self.top_k  # [E], sums to 1
        # Switch Transformer's balance loss (Fedus et al. 2021, eq. 4): 1 when all experts get the same share.
        balance = self.experts * (load * probabilities.mean((0, 1))).sum()
        return self.w2(up.flatten(-2)), balance, logits.logsumexp(-1).square().mean(), load


class Layer(nn.Module):
    """Attention and experts, each after a norm and beside a residual; dropout (training only) on what they add."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.block_sparse_moe = Experts(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Experts.forward`, for the whole layer."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        out, balance, z_loss, load = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + self.dropout(out), balance, z_loss, load


@dataclass(slots=True)
class Routing:
    """Mean balance loss and z-loss over the layers, and each layer's load [L, E]."""

    balance: Tensor
    z_loss: Tensor
    load: Tensor


class MixtralForTraining(nn.Module):
    """The whole model; input and output embeddings are one matrix."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = nn.Dropout(dropout)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        cos, sin = _rotary_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        # GPT-2's: 0.02, and less where a layer writes into the residual, so that its variance does not grow with depth.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "w2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.layers)) ** 0.5 if writes else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Routing]:
        """ids [B, T] -> logits [B, T, V] and the routing."""
        x = self.dropout(self.embed_tokens(ids))
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        seen = []
        for layer in self.layers:
            x, *routing = layer(x, cos, sin)
            seen.append(routing)
        balance, z_loss, load = (torch.stack(values) for values in zip(*seen, strict=True))
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return logits, Routing(balance.mean(), z_loss.mean(), load)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout of Hugging Face; x [B, heads, T, D]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def _rotary_table(shape: Shape) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    positions = torch.arange(shape.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, shape.rope_theta**-exponents).repeat(1, 2)  # [T, D]
    return angles.cos(), angles.sin()
