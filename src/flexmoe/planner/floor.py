"""The floor: bytes that one decode step must read, whatever engine computes it, and what prompts must multiply.

Enters: a ModelConfig. Leaves: bytes, multiply-adds.

Each weight that a step needs is read once: attention, norms, router, shared and dense feed-forwards, the language-model
head, and in each MoE layer the D distinct experts that any of the step's rows chose. And the keys and values of the
rows' contexts. Everything counts in the model's number format, the router too, though it may be kept in fp32; of
quantized weights the bits count, and the scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.config.model import ModelConfig
from flexmoe.config.packing import GROUP
from flexmoe.models import families
from flexmoe.models.quantized import bits_of


@dataclass(frozen=True, slots=True)
class Floor:
    """Bytes a step. fixed: weights that every step reads; experts: those of the experts chosen; kv: keys and values."""

    fixed: int
    experts: int
    kv: int

    @property
    def total(self) -> int:
        return self.fixed + self.experts + self.kv


def floor(
    config: ModelConfig,
    batch: float,
    context: float,
    itemsize: int,
    distinct: Sequence[float],
    quantization: str | None = None,
) -> Floor:
    """What a step of `batch` rows, on average, must read, each of which sees `context` tokens.

    itemsize: bytes of a number. distinct: D of each MoE layer, in order. quantization: of the weights.
    """
    fixed = experts = 0.0
    share = 0.0 if config.moe is None or not distinct else sum(distinct) / len(distinct) / config.moe.num_experts
    for name, parameter in families.parameters(config).items():
        bits = bits_of(name, quantization)
        size = math.prod(parameter.shape) * (itemsize if bits is None else bits / 8 + 2 / GROUP)
        if ".experts." in name:
            experts += size * share  # all layers have the same shape
        elif name == "embed_tokens.weight":
            rows = batch + (config.vocab_size if config.tie_embeddings else 0)  # one for each token, and the head
            fixed += size * rows / config.vocab_size
        else:
            fixed += size
    return Floor(round(fixed), round(experts), _kv_bytes(config, batch, context, itemsize))


def mean_context(prompt: float, output: float) -> float:
    """Tokens that the average decode step sees, of `output`: the first sees the prompt and a token, the last all."""
    return prompt + (output + 1) / 2


def prompt_flops(config: ModelConfig, prompts: int, tokens: int) -> float:
    """Multiply-adds, counted twice, of so many prompts of so many tokens each, and one row of logits for each.

    Of all rows in all layers, as engines compute them. What is neither key nor value of the last layer is needed of one
    row alone; where this engine leaves out the others (`models/fused_prompts.py`) it has up to a layer less to do.
    """
    a, head = config.attention, config.vocab_size * config.hidden_size
    products = prompts * tokens * (config.num_active_parameters() - head) + prompts * head
    pairs = sum(_pairs(tokens, layer.window) for layer in config.layers)  # of a query and a key
    return 2.0 * (products + 2 * prompts * pairs * a.num_heads * a.head_dim)


def _pairs(tokens: int, window: int | None) -> int:
    seen = tokens if window is None else min(tokens, window)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def expected_distinct(config: ModelConfig, batch: float) -> list[float]:
    """D of each MoE layer: distinct experts that `batch` tokens choose if all choices are equally likely."""
    if config.moe is None:
        return []
    distinct = config.moe.expected_experts(batch)
    return [distinct for layer in config.layers if layer.is_moe]


def _kv_bytes(config: ModelConfig, batch: float, context: float, itemsize: int) -> int:
    a = config.attention
    seen = sum(context if layer.window is None else min(context, layer.window) for layer in config.layers)
    return round(batch * seen * 2 * a.num_kv_heads * a.head_dim * itemsize)
