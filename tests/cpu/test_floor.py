"""The floor by hand: the published shapes, and each thing that a step reads counted once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexmoe.config.model import LayerConfig
from flexmoe.models.presets import PRESETS
from flexmoe.planner.floor import expected_distinct, floor, prompt_flops
from tests.cpu.tiny_decoders import config

# Bytes of weights a step in bf16, GB, and distinct experts under uniform routing; worked out apart from this code.
FIGURES = [
    ("mixtral-8x7b", 1, 25.5, 2.0),
    ("mixtral-8x7b", 8, 84.1, 7.2),
    ("mixtral-8x7b", 32, 93.1, 8.0),
    ("mixtral-8x7b", 128, 93.1, 8.0),
    ("olmoe-1b-7b", 1, 2.36, 8.0),
    ("olmoe-1b-7b", 8, 9.20, 42.0),
    ("olmoe-1b-7b", 32, 13.45, 63.1),
    ("olmoe-1b-7b", 128, 13.63, 64.0),
    ("qwen3-30b-a3b", 1, 6.08, 8.0),
    ("qwen3-30b-a3b", 8, 25.8, 51.6),
    ("qwen3-30b-a3b", 32, 53.1, 111.8),
    ("qwen3-30b-a3b", 128, 60.4, 128.0),
]


@pytest.mark.parametrize(("name", "batch", "gigabytes", "distinct"), FIGURES)
def test_published_models(name: str, batch: int, gigabytes: float, distinct: float) -> None:
    model = PRESETS[name].config
    needed = floor(model, batch, context=0, itemsize=2, distinct=expected_distinct(model, batch))
    assert needed.kv == 0
    assert needed.total / 1e9 == pytest.approx(gigabytes, rel=3e-3)
    assert expected_distinct(model, batch) == pytest.approx([distinct] * model.num_layers, abs=0.05)


@pytest.mark.parametrize(("name", "kib"), [("mixtral-8x7b", 128), ("qwen3-30b-a3b", 96), ("olmoe-1b-7b", 128)])
def test_keys_and_values_of_the_batch(name: str, kib: int) -> None:
    assert floor(PRESETS[name].config, 8, context=100.5, itemsize=2, distinct=[]).kv == 8 * 100.5 * kib * 1024


def test_mixtral_by_hand() -> None:
    hidden, width, vocab, layers = 4096, 14336, 32000, 32
    attention = hidden * (4096 + 2 * 1024) + 4096 * hidden
    fixed = layers * (attention + 8 * hidden + 2 * hidden) + vocab * hidden + hidden + 3 * hidden
    needed = floor(PRESETS["mixtral-8x7b"].config, 3, context=0, itemsize=2, distinct=[4.5] * layers)
    assert needed.fixed == fixed * 2
    assert needed.experts == layers * 4.5 * 3 * hidden * width * 2


# The tiny decoder: hidden 64, 4 heads and 2 KV heads of 16, 6 experts of width 24, dense width 40, vocabulary 50.
_ATTENTION = 64 * (4 + 2 * 2) * 16 + 4 * 16 * 64 + 2 * 64
_OUTER = 50 * 64 + 64 + 2 * 64  # head, last norm, two rows of the embedding table


def test_one_layer_of_experts_and_a_dense_one() -> None:
    needed = floor(config(), 2, context=10, itemsize=4, distinct=[3.0])
    assert needed.fixed == 4 * (_OUTER + 2 * _ATTENTION + 6 * 64 + 3 * 64 * 40)
    assert needed.experts == 4 * 3 * (3 * 64 * 24)
    assert needed.kv == 4 * 2 * 2 * 10 * (2 * 2 * 16)
    assert needed.total == needed.fixed + needed.experts + needed.kv


def test_a_shared_expert_is_always_read() -> None:
    plain, shared = config(), config(moe={"shared_width": 20, "shared_gate": True})
    more = floor(shared, 1, 0, 2, [2]).total - floor(plain, 1, 0, 2, [2]).total
    assert more == 2 * (3 * 64 * 20 + 64)


def test_a_tied_head_is_the_embedding_table() -> None:
    plain, tied = config(), config(tie_embeddings=True)
    assert floor(tied, 1, 0, 2, [2]) == floor(plain, 1, 0, 2, [2])


def test_a_window_bounds_what_is_seen() -> None:
    model = replace(config(), layers=(LayerConfig(is_moe=True, window=8), LayerConfig(is_moe=False)))
    assert floor(model, 1, context=100, itemsize=2, distinct=[2]).kv == 2 * (8 + 100) * (2 * 2 * 16)
    assert floor(model, 1, context=5, itemsize=2, distinct=[2]).kv == 2 * (5 + 5) * (2 * 2 * 16)


def test_a_dense_model_touches_no_expert() -> None:
    model = replace(config(), moe=None, layers=(LayerConfig(is_moe=False),))
    assert floor(model, 4, 0, 2, []).experts == 0
    assert expected_distinct(model, 4) == []


def test_what_a_prompt_must_multiply() -> None:
    """Two multiply-adds a parameter and token; twice the numbers of a head for each query and key that it sees."""
    layers = (LayerConfig(is_moe=True), LayerConfig(is_moe=True, window=2))
    model = replace(PRESETS["mixtral-8x7b"].config, layers=layers)
    head = model.vocab_size * model.hidden_size
    weights = model.num_active_parameters() - head
    pairs = (1 + 2 + 3) + (1 + 2 + 2)  # of three tokens, all and with a window of two
    assert prompt_flops(model, 5, 3) == 2 * 5 * (3 * weights + head + 2 * pairs * model.attention.num_heads * 128)
