"""Rotary: tables of cosines and sines for every position, with the rescalings that long-context checkpoints use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexmoe.config.model import RopeConfig


class Rotary:
    """Looks up cos and sin [T, 1, R] of positions [T]; the first half of sin is negated (see `apply_rotary`)."""

    def __init__(self, config: RopeConfig, max_position: int, *, dtype: torch.dtype, device: torch.device) -> None:
        cos, sin = rotary_tables(config, max_position)
        self._cos = torch.cat((cos, cos), -1)[:, None].to(device=device, dtype=dtype)
        self._sin = torch.cat((-sin, sin), -1)[:, None].to(device=device, dtype=dtype)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def rotary_tables(config: RopeConfig, max_position: int) -> tuple[Tensor, Tensor]:
    """cos and sin fp32 [P, R/2] of the positions below max_position."""
    frequencies, scale = inverse_frequencies(config)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    return angles.cos() * scale, angles.sin() * scale


def inverse_frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """Frequencies [R/2] in radians a position, and the factor on cos and sin.

    "dynamic" equals "default" up to the context the model was trained for, and the engine serves no longer one.
    """
    plain = 1.0 / config.theta ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim)
    if config.kind == "linear":
        return plain / config.factor, 1.0
    if config.kind == "yarn":
        return _yarn(plain, config)
    if config.kind == "llama3":
        return _llama3(plain, config), 1.0
    return plain, 1.0


def _yarn(plain: Tensor, c: RopeConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): slow dimensions are interpolated, fast ones kept, a ramp between."""
    assert c.original_max_position is not None

    def dimension(rotations: float) -> float:
        period = c.original_max_position / (rotations * 2 * math.pi)  # type: ignore[operator]
        return c.rotary_dim * math.log(period) / (2 * math.log(c.theta))

    low, high = dimension(c.beta_fast), dimension(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.rotary_dim - 1)
    ramp = (torch.arange(c.rotary_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return plain / c.factor * (1 - kept) + plain * kept, _yarn_attention_factor(c)


def _yarn_attention_factor(c: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if c.factor <= 1 else 0.1 * weight * math.log(c.factor) + 1.0

    if c.attention_factor is not None:
        return c.attention_factor
    if c.mscale and c.mscale_all_dim:
        return mscale(c.mscale) / mscale(c.mscale_all_dim)
    return mscale(1.0)


def _llama3(plain: Tensor, c: RopeConfig) -> Tensor:
    """Llama 3.1: wavelengths longer than the trained context are stretched by `factor`, short ones kept."""
    assert c.original_max_position is not None
    wavelength = 2 * math.pi / plain
    long, short = c.original_max_position / c.low_freq_factor, c.original_max_position / c.high_freq_factor
    kept = (c.original_max_position / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    blended = (1 - kept) * plain / c.factor + kept * plain
    scaled = torch.where(wavelength > long, plain / c.factor, plain)
    return torch.where((wavelength <= long) & (wavelength >= short), blended, scaled)
