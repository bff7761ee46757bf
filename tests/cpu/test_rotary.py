"""Rotary embedding: rotation, frequencies of every scaling and whole tables, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexmoe.config.model import RopeConfig
from flexmoe.kernels.rotary import apply_rotary
from flexmoe.layers.rotary import Rotary, inverse_frequencies
from tests.cpu.nearness import assert_near, poisoned

CPU = torch.device("cpu")
DIM = 32
YARN = {"factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("linear", {"factor": 3.0}),
    ("dynamic", {"factor": 4.0}),
    ("llama3", LLAMA3),
    ("llama3", {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}),
    ("yarn", YARN),
    ("yarn", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
    ("yarn", {**YARN, "truncate": False}),
    ("yarn", {**YARN, "attention_factor": 1.3}),
    ("yarn", {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5}),
    ("yarn", {**YARN, "mscale": 0.8}),
    ("yarn", {**YARN, "factor": 0.5}),
    ("yarn", {**YARN, "original_max_position_embeddings": 4}),  # the ramp would begin below dimension 0
    ("yarn", {**YARN, "original_max_position_embeddings": 10**9}),  # and here end beyond the last one
]


def theirs(kind: str, options: dict[str, Any], theta: float) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": kind, "rope_theta": theta, **options}
    config = LlamaConfig(hidden_size=2 * DIM, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope)
    return LlamaRotaryEmbedding(config)


def ours(kind: Any, options: dict[str, Any], theta: float) -> RopeConfig:
    names = {"original_max_position_embeddings": "original_max_position"}
    return RopeConfig(theta, DIM, kind, **{names.get(name, name): value for name, value in options.items()})


@pytest.mark.parametrize("theta", [10000.0, 500.0, 1e6])
@pytest.mark.parametrize(("kind", "options"), SCALINGS)
def test_frequencies_of_every_scaling(kind: str, options: dict[str, Any], theta: float) -> None:
    expected = theirs(kind, options, theta)
    frequencies, scale = inverse_frequencies(ours(kind, options, theta))
    torch.testing.assert_close(frequencies, expected.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected.attention_scaling, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), SCALINGS[:6])
def test_tables_and_rotation_together(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """From positions, in any order and repeated, to rotated queries and keys."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.tensor([511, 0, 7, 7, 63, 64, 200])
    x = torch.randn(len(positions), 5, DIM).to(dtype)
    cos, sin = theirs(kind, options, 1e4)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    before = x.clone()
    rotary = Rotary(ours(kind, options, 1e4), 512, dtype=dtype, device=CPU)
    with poisoned():
        rotated = apply_rotary(x, *rotary(positions))
    assert rotated.dtype is dtype
    assert_near(rotated, expected[0].transpose(0, 1), 1e-6 if dtype is torch.float32 else 5e-3)
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [2, 6, 16, 30])
def test_dimensions_beyond_the_rotated_ones_stay(size: int) -> None:
    x = torch.randn(4, 3, 30)
    cos, sin = Rotary(RopeConfig(100.0, size), 8, dtype=torch.float32, device=CPU)(torch.tensor([3, 0, 7, 1]))
    rotated = apply_rotary(x, cos, sin)
    frequencies = 100.0 ** (-torch.arange(0, size, 2).double() / size)
    angles = torch.tensor([3.0, 0.0, 7.0, 1.0]).double()[:, None, None] * frequencies
    first, second = x[..., : size // 2].double(), x[..., size // 2 : size].double()
    wanted = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    assert_near(rotated[..., :size], torch.cat(wanted, -1), 1e-6)
    assert torch.equal(rotated[..., size:], x[..., size:])
    assert torch.equal(rotated[1], x[1]), "position 0 is not turned"


def test_part_of_a_wider_row() -> None:
    """The layer rotates queries and keys in place of the fused projection, values left out."""
    wide = torch.randn(3, 7, 16)
    cos, sin = Rotary(RopeConfig(1e4, 16), 8, dtype=torch.float32, device=CPU)(torch.tensor([1, 5, 2]))
    assert torch.equal(apply_rotary(wide[:, 1:5], cos, sin), apply_rotary(wide[:, 1:5].contiguous(), cos, sin))


def test_a_position_beyond_the_table_is_an_error() -> None:
    rotary = Rotary(RopeConfig(1e4, 16), 8, dtype=torch.float32, device=CPU)
    with pytest.raises((IndexError, RuntimeError)):
        rotary(torch.tensor([8]))
