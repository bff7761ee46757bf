"""The floor: bytes that one decode step must read, whatever engine computes it. Enters: a ModelConfig. Leaves: bytes.

Each weight that a step needs is read once: attention, norms, router, shared and dense feed-forwards, the language-model
head, and in each MoE layer the D distinct experts that any of the step's rows chose. And the keys and values of the
rows' contexts. Everything counts in the model's number format, the router too, though it may be kept in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Floor:
    """Bytes a step. fixed: weights that every step reads; experts: those of the experts chosen; kv: keys and values."""

    fixed: int
    experts: int
    kv: int

    @property
    def total(self) -> int:
        return self.fixed + self.experts + self.kv


def floor(config: ModelConfig, batch: int, context: float, itemsize: int, distinct: Sequence[float]) -> Floor:
    """What a step of `batch` rows must read, each of which sees `context` tokens.

    itemsize: bytes of a number. distinct: D of each MoE layer, in order.
    """
    expert, all_experts = _expert_parameters(config)
    fixed = config.num_parameters() - len(distinct) * all_experts + batch * config.hidden_size
    if not config.tie_embeddings:
        fixed -= config.vocab_size * config.hidden_size  # of this table a row for each token is read, counted above
    return Floor(
        fixed * itemsize, round(sum(distinct) * expert * itemsize), _kv_bytes(config, batch, context, itemsize)
    )


def expected_distinct(config: ModelConfig, batch: int) -> list[float]:
    """D of each MoE layer: distinct experts that `batch` tokens choose if all choices are equally likely."""
    if config.moe is None:
        return []
    distinct = config.moe.expected_experts(batch)
    return [distinct for layer in config.layers if layer.is_moe]


def _expert_parameters(config: ModelConfig) -> tuple[int, int]:
    """Of one expert, and of a whole layer of them."""
    if config.moe is None:
        return 0, 0
    one = 3 * config.hidden_size * config.moe.expert_width
    return one, one * config.moe.num_experts


def _kv_bytes(config: ModelConfig, batch: int, context: float, itemsize: int) -> int:
    a = config.attention
    seen = sum(context if layer.window is None else min(context, layer.window) for layer in config.layers)
    return round(batch * seen * 2 * a.num_kv_heads * a.head_dim * itemsize)
