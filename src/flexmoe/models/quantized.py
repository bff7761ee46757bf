"""Which parameters are quantized, and to how many bits. Enters: a parameter's name. Leaves: bits, or None.

Projections of attention, experts and dense layers as asked for. The embedding and the head keep 8 bits in any case:
each token is one row of them. Norms, biases and routers, whose bytes do not count, stay as they are. No torch.
"""

from __future__ import annotations

import math
import re

from flexmoe.config.packing import GROUP
from flexmoe.config.shard import Shard
from flexmoe.models import families
from flexmoe.models.slices import cuts

BITS = {"int8": 8, "int4": 4}
_PROJECTION = re.compile(
    r"layers\.\d+\.(attention\.(qkv|out)\.weight|(mlp|moe\.shared)\.(gate_up|down)\.weight|moe\.experts\.(gate_up|down))"
)
_TABLES = ("embed_tokens.weight", "lm_head.weight")


def bits_of(name: str, quantization: str | None) -> int | None:
    """How many bits a weight of this parameter takes, scales apart; None: it stays in the model's dtype."""
    if quantization is None:
        return None
    if name in _TABLES:
        return 8
    return BITS[quantization] if _PROJECTION.fullmatch(name) else None


def weight_bytes(shard: Shard, itemsize: int, quantization: str | None) -> int:
    """Bytes of the weights that a rank holds, replicas counted each time. itemsize: of a weight that is not rounded."""
    whole = families.parameters(shard.config)
    total = 0.0
    for name, cut in cuts(shard).items():
        bits = bits_of(name, quantization)
        item = itemsize if bits is None else bits / 8 + 2 / GROUP
        total += math.prod(cut.shape(whole[name].shape)) * item
    return round(total)
