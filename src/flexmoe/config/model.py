"""ModelConfig: a decoder described by data. Enters: nothing but values. Leaves: what layers and loader are built from.

Letters: H hidden size, F feed-forward or expert width, E experts, K experts a token (top-k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
QKNorm = Literal["none", "head", "full"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. `kind` other than "default" rescales the frequencies for long contexts.

    Field names follow Hugging Face's `rope_parameters`; a field that a kind does not use stays None.
    rotary_dim: how many leading dimensions of a head are rotated (even).
    """

    theta: float
    rotary_dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Grouped-query attention.

    qk_norm: RMS norm of queries and keys before the rotary embedding, over each head ("head", Qwen3) or over
    the whole projection ("full", OLMoE). clip_qkv: clamp of the three projections to +-clip (OLMoE).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm = "none"
    clip_qkv: float | None = None

    @property
    def normed_heads(self) -> int:
        """Heads of queries and keys that are normed."""
        return 0 if self.qk_norm == "none" else self.num_heads + self.num_kv_heads


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """One MoE layer: E experts of width F, K of them a token.

    renormalize: divide the K router weights by their sum. shared_width: width of the expert every token takes
    (0: none); shared_gate: that expert's output is scaled by a sigmoid gate of the token (Qwen2-MoE).
    """

    num_experts: int
    top_k: int
    expert_width: int
    renormalize: bool
    shared_width: int = 0
    shared_gate: bool = False

    def expected_experts(self, tokens: float) -> float:
        """How many experts so many tokens are expected to choose, if all are as likely."""
        missed: float = (1 - self.top_k / self.num_experts) ** tokens  # by all of them, of each expert
        return self.num_experts * (1 - missed)


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs from layer to layer. window: how many latest positions attention sees (None: all)."""

    is_moe: bool
    window: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole decoder-only transformer with pre-norm blocks and SwiGLU feed-forwards."""

    family: str
    architecture: str
    vocab_size: int
    hidden_size: int
    dense_width: int
    attention: AttentionConfig
    moe: MoEConfig | None
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    max_position: int
    tie_embeddings: bool
    dense_bias: bool = False
    checkpoint_dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        a = self.attention
        return (a.num_heads + 2 * a.num_kv_heads) * a.head_dim

    def num_parameters(self) -> int:
        """Parameters of the whole model, embeddings included."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.hidden_size + sum(self._layer_parameters(layer) for layer in self.layers)

    def num_active_parameters(self) -> int:
        """Parameters that one token's decode step reads: all but the experts it skips and the embedding table."""
        total = self.num_parameters()
        if not self.tie_embeddings:
            total -= self.vocab_size * self.hidden_size
        if self.moe is None:
            return total
        skipped = self.moe.num_experts - self.moe.top_k
        per_expert = 3 * self.hidden_size * self.moe.expert_width
        return total - skipped * per_expert * sum(layer.is_moe for layer in self.layers)

    def _layer_parameters(self, layer: LayerConfig) -> int:
        a, h = self.attention, self.hidden_size
        q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        norms = 2 * h + {"none": 0, "head": 2 * a.head_dim, "full": q_size + kv_size}[a.qk_norm]
        attention = h * self.qkv_size + q_size * h
        biases = self.qkv_size * a.qkv_bias + h * a.out_bias
        if not layer.is_moe or self.moe is None:
            dense = 3 * h * self.dense_width + (2 * self.dense_width + h) * self.dense_bias
            return norms + attention + biases + dense
        m = self.moe
        experts = 3 * h * m.expert_width * m.num_experts + h * m.num_experts
        shared = 3 * h * m.shared_width + h * m.shared_gate
        return norms + attention + biases + experts + shared
