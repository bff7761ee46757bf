"""ModelConfig counts parameters: each feature adds what it must, on a small model counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexmoe.config.model import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RopeConfig

H, V, F, E, K, D = 10, 100, 6, 5, 2, 4  # hidden, vocabulary, expert width, experts, experts a token, head size
Q, KV = 3 * D, 1 * D
DENSE = 7
ATTENTION = AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=D, rope=RopeConfig(theta=1e4, rotary_dim=D))
MOE = MoEConfig(num_experts=E, top_k=K, expert_width=F, renormalize=True)
CONFIG = ModelConfig(
    family="f", architecture="A", vocab_size=V, hidden_size=H, dense_width=DENSE, attention=ATTENTION, moe=MOE,
    layers=(LayerConfig(is_moe=True), LayerConfig(is_moe=False), LayerConfig(is_moe=True, window=9)),
    norm_eps=1e-5, max_position=64, tie_embeddings=False,
)  # fmt: skip

ATTENTION_SIZE = H * (Q + 2 * KV) + Q * H + 2 * H  # with the two norms
EXPERT = 3 * H * F
TOTAL = 2 * V * H + H + 3 * ATTENTION_SIZE + 2 * (E * EXPERT + E * H) + 3 * H * DENSE


def test_counted_by_hand() -> None:
    assert CONFIG.num_layers == 3
    assert CONFIG.qkv_size == Q + 2 * KV
    assert CONFIG.num_parameters() == TOTAL
    assert CONFIG.num_active_parameters() == TOTAL - V * H - 2 * (E - K) * EXPERT


@pytest.mark.parametrize(
    ("part", "change", "more"),
    [
        ("attention", {"qkv_bias": True}, 3 * (Q + 2 * KV)),
        ("attention", {"out_bias": True}, 3 * H),
        ("attention", {"qk_norm": "head"}, 3 * 2 * D),
        ("attention", {"qk_norm": "full"}, 3 * (Q + KV)),
        ("attention", {"clip_qkv": 1.0}, 0),
        ("moe", {"shared_width": 8}, 2 * 3 * H * 8),
        ("moe", {"shared_width": 8, "shared_gate": True}, 2 * (3 * H * 8 + H)),
        ("moe", {"renormalize": False}, 0),
        ("", {"dense_bias": True}, 2 * DENSE + H),
    ],
)
def test_what_a_feature_adds_every_token_reads(part: str, change: dict[str, Any], more: int) -> None:
    inner = {part: replace(getattr(CONFIG, part), **change)} if part else change
    config = replace(CONFIG, **inner)
    assert config.num_parameters() == TOTAL + more
    assert config.num_active_parameters() == CONFIG.num_active_parameters() + more


def test_tied_embeddings_are_counted_once_and_are_read_as_the_head() -> None:
    tied = replace(CONFIG, tie_embeddings=True)
    assert tied.num_parameters() == TOTAL - V * H
    assert tied.num_active_parameters() == CONFIG.num_active_parameters()


def test_a_dense_model_reads_all_but_its_embedding_table() -> None:
    dense = replace(CONFIG, moe=None, layers=(LayerConfig(is_moe=False),) * 2)
    assert dense.num_parameters() == 2 * V * H + H + 2 * (ATTENTION_SIZE + 3 * H * DENSE)
    assert dense.num_active_parameters() == dense.num_parameters() - V * H
