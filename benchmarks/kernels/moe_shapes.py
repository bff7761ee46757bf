"""What the benchmarks of routing know of the models: sizes, and batches to try."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of one model's MoE layer."""

    name: str
    hidden: int
    experts: int
    top_k: int
    renormalize: bool


SHAPES = (
    Shape("Mixtral", 4096, 8, 2, True),
    Shape("Qwen3-30B", 2048, 128, 8, True),
    Shape("OLMoE", 2048, 64, 8, False),
    Shape("TinyMistral", 1024, 6, 2, True),
)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048)
DTYPE = torch.bfloat16


def random_choices(shape: Shape, batch: int) -> Tensor:
    """int32 [batch, K] on the device: distinct experts for each row, all equally likely."""
    return torch.rand(batch, shape.experts, device="cuda").argsort(-1)[:, : shape.top_k].int().contiguous()
