"""From what was timed to samples of a machine file, named and shaped as planner/operations.py defines them."""

from __future__ import annotations

import math

from flexmoe.bench.native_operations import NativeLayers
from flexmoe.bench.torch_operations import TorchLayers
from flexmoe.config.machine import Sample
from flexmoe.config.model import ModelConfig

LEAST = 5e-8  # seconds; what takes less is lost in the noise of the others
_ROUTER = ("route", "topk", "group_by_expert", "topk_by_expert")
_EXPERTS = (
    "expert_gate_up_gemv", "expert_down_gemv", "expert_gate_up_grouped", "expert_down_grouped", "combine",
    "combine_norm",
)  # fmt: skip


def step_samples(config: ModelConfig, added: dict[str, float], batch: int, context: int) -> list[Sample]:
    """Operations of a decode step on a GPU, as bench/step_operations.py names them."""
    a, moe = config.attention, config.moe
    assert moe is not None
    parts = [
        ("linear", batch, (config.qkv_size, config.hidden_size), ("qkv",)),
        ("linear", batch, (config.hidden_size, a.num_heads * a.head_dim), ("o",)),
        ("linear", batch, (config.vocab_size, config.hidden_size), ("head",)),
        ("attention", batch, (context, a.num_heads, a.num_kv_heads, a.head_dim), ("decode_attention",)),
        ("router", batch, (moe.num_experts, config.hidden_size, moe.top_k), _ROUTER),
        ("experts", batch * moe.top_k, _experts_shape(config, batch), _EXPERTS),
    ]
    found = []
    for op, rows, shape, names in parts:
        took = [added[name] for name in names if name in added]
        if took:
            found.append(Sample(f"fused.{op}", "bfloat16", rows, shape, max(LEAST, sum(took))))
    return found


def gpu_prompt_samples(config: ModelConfig, took: dict[str, float], rows: int, before: int = 0) -> list[Sample]:
    """Operations of a prompt on a GPU, as bench/prompt_operations.py tells them apart."""
    a, moe = config.attention, config.moe
    assert moe is not None
    parts = [
        ("linear", "qkv", rows, (config.qkv_size, config.hidden_size)),
        ("linear", "output", rows, (config.hidden_size, a.num_heads * a.head_dim)),
        ("linear", "head", 1, (config.vocab_size, config.hidden_size)),
        ("prompt", "attention", rows, (before, a.num_heads, a.num_kv_heads, a.head_dim)),
        ("experts", "experts", rows * moe.top_k, _experts_shape(config, rows)),
        ("router", "router", rows, (moe.num_experts, config.hidden_size, moe.top_k)),
    ]
    return [
        Sample(f"prompts.{op}", "bfloat16", number, shape, took[name])
        for op, name, number, shape in parts if took[name] > LEAST
    ]  # fmt: skip


def prompt_samples(layers: TorchLayers, rows: int, before: int = 0, ranks: int = 1) -> list[Sample]:
    """Operations of a layer in torch for a prompt of so many tokens."""
    a = layers.config.attention
    shape = before, a.num_heads, a.num_kv_heads, a.head_dim, a.normed_heads
    return torch_samples(layers, layers.prompt(rows, before), "prompt", rows, shape, ranks)


def torch_decode_samples(layers: TorchLayers, rows: int, context: int, ranks: int = 1) -> list[Sample]:
    """The same for decodes of so many rows, each with `context` keys."""
    a = layers.config.attention
    shape = context, a.num_heads, a.num_kv_heads, a.head_dim, a.normed_heads
    return torch_samples(layers, layers.decode(rows, context), "attention", rows, shape, ranks)


def torch_samples(
    layers: TorchLayers, took: dict[str, float], name: str, rows: int, attention: tuple[float, ...], ranks: int
) -> list[Sample]:
    """What TorchLayers measured, as samples."""
    config, dtype = layers.config, str(layers.dtype).removeprefix("torch.")
    a, moe = config.attention, config.moe
    assert moe is not None
    parts = [
        ("linear", took["qkv"], rows, (config.qkv_size, config.hidden_size)),
        ("linear", took["out"], rows, (config.hidden_size, a.num_heads * a.head_dim)),
        (name, took[name], rows, attention),
        ("experts", took["experts"], rows * moe.top_k,
         _experts_shape(config, rows)),
        ("router", took["router"], rows, (moe.num_experts, config.hidden_size, moe.top_k)),
    ]  # fmt: skip
    return [
        Sample(f"torch.{op}", dtype, number, shape, seconds, ranks)
        for op, seconds, number, shape in parts if seconds > LEAST
    ]  # fmt: skip


def native_samples(layers: NativeLayers, rows: int, context: int) -> list[Sample]:
    """Operations of a decode step in the C kernels, whose parts are shared out by what must be read."""
    config, dtype, took = layers.config, str(layers.dtype).removeprefix("torch."), layers.step(rows, context)
    a, moe, hidden = config.attention, config.moe, config.hidden_size
    assert moe is not None
    qkv, out = (config.qkv_size, hidden), (hidden, a.num_heads * a.head_dim)
    share = took["projections"] / (math.prod(qkv) + math.prod(out))
    experts = _experts_shape(config, rows)
    routed = took["feed"] * moe.num_experts * hidden / (moe.num_experts * hidden + 3 * math.prod(experts))
    parts = [
        ("linear", rows, qkv, share * math.prod(qkv)), ("linear", rows, out, share * math.prod(out)),
        ("head", rows, (config.vocab_size, hidden), took["head"]),
        ("attention", rows, (context, a.num_heads, a.num_kv_heads, a.head_dim), took["attention"]),
        ("router", rows, (moe.num_experts, hidden, moe.top_k), routed),
        ("experts", rows * moe.top_k, experts, took["feed"] - routed),
    ]  # fmt: skip
    return [
        Sample(f"fused.{op}", dtype, number, shape, seconds)
        for op, number, shape, seconds in parts if seconds > LEAST
    ]  # fmt: skip


def native_attention(layers: NativeLayers, rows: int, context: int) -> list[Sample]:
    """Attention alone."""
    a, dtype = layers.config.attention, str(layers.dtype).removeprefix("torch.")
    shape = context, a.num_heads, a.num_kv_heads, a.head_dim
    seconds = layers.attention(rows, context)
    return [Sample("fused.attention", dtype, rows, shape, seconds)] if seconds > LEAST else []


def _experts_shape(config: ModelConfig, rows: int) -> tuple[float, float, float]:
    """Experts that rows are expected to choose, hidden size, width."""
    assert config.moe is not None
    return round(config.moe.expected_experts(rows), 2), config.hidden_size, config.moe.expert_width
