"""Decode attention over the paged KV cache: models, batches and contexts by tiles. Counts the keys and values read."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from harness import Case, run
from torch import Tensor

from flexmoe.kernels.decode_attention import DecodeRows, QKNormWeights
from flexmoe.kernels.triton.decode_attention import (
    DecodeAttentionTile,
    decode_attention,
    default_tile,
    workspace_shapes,
)

_BLOCK = 16
_CACHE_BYTES = 192 << 20  # that the rotating sets read together, at least: three times L2
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Heads of one model's attention."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: str = "none"


SHAPES = (
    Shape("Mixtral", 32, 8, 128),
    Shape("Qwen3-30B", 32, 4, 128, "head"),
    Shape("OLMoE", 16, 16, 128, "full"),
    Shape("TinyMistral", 32, 8, 32),
)
CONTEXTS = {1: (200, 1024, 8192), 4: (200, 1024), 8: (200, 1024), 32: (200, 1024), 128: (200, 1024), 256: (200, 1024)}
# keys, warps, stages
_FORMS = (
    (16, 1, 1), (16, 2, 1), (16, 4, 1), (32, 2, 1), (32, 4, 1), (32, 8, 1), (64, 4, 1), (64, 8, 1),
    (32, 4, 3), (32, 4, 5), (32, 4, 7), (64, 4, 5),
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """One large cache, and sets of rows that each read another part of it."""

    qkv: Tensor
    cache: Tensor
    rows: list[DecodeRows]
    cos: Tensor
    sin: Tensor
    norm: QKNormWeights | None


@functools.lru_cache(maxsize=1)
def inputs(shape: Shape, batch: int, context: int) -> Inputs:
    """Random inputs on the device; blocks are shuffled."""
    blocks = -(-context // _BLOCK)
    sets = -(-_CACHE_BYTES // _bytes(shape, batch, context))
    size, device = shape.num_kv_heads * shape.head_dim, torch.device("cuda")
    slots = sets * batch * blocks * _BLOCK
    cache = torch.randn(slots, 2, shape.num_kv_heads, shape.head_dim, dtype=_DTYPE, device=device)
    tables = torch.randperm(sets * batch * blocks, device=device).int().view(sets, -1)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    stride = torch.tensor([blocks], dtype=torch.int32, device=device)
    qkv = torch.randn(batch, shape.num_heads * shape.head_dim + 2 * size, dtype=_DTYPE, device=device)
    angles = torch.rand(context, shape.head_dim // 2, device=device) * 6.3
    norm, full = None, shape.qk_norm == "full"
    if shape.qk_norm != "none":
        widths = (shape.num_heads * shape.head_dim, size) if full else (shape.head_dim, shape.head_dim)
        weights = [torch.randn(width, dtype=_DTYPE, device=device) for width in widths]
        norm = QKNormWeights(weights[0], weights[1], 1e-5, full)
    rows = [DecodeRows(lengths, table, stride, _BLOCK) for table in tables]
    return Inputs(qkv, cache, rows, angles.cos(), angles.sin(), norm)


def launches(shape: Shape, batch: int, context: int, tile: DecodeAttentionTile) -> list[Callable[[], None]]:
    """One closure for each set of rows."""
    given = inputs(shape, batch, context)
    out = torch.empty(batch, shape.num_heads * shape.head_dim, dtype=_DTYPE, device="cuda")
    shapes = workspace_shapes(batch, shape.num_heads, shape.head_dim, tile.splits)
    workspace = torch.empty(shapes[0], device="cuda"), torch.empty(shapes[1], device="cuda")

    def launch(rows: DecodeRows) -> None:
        decode_attention(
            given.qkv, given.cache, rows, given.cos, given.sin, out, norm=given.norm, workspace=workspace, tile=tile,
            pdl=True,
        )  # fmt: skip

    return [functools.partial(launch, rows) for rows in given.rows]


def tiles(shape: Shape, batch: int, context: int) -> Iterator[DecodeAttentionTile]:
    """The default, and others around its number of splits."""
    default = default_tile(batch, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    yield default
    shared = shape.num_heads > shape.num_kv_heads
    forms = [(per_head, *form) for per_head in ((False, True) if shared else (True,)) for form in _FORMS]
    for splits, (per_head, keys, warps, stages) in itertools.product(
        sorted({max(1, default.splits // 2), default.splits, min(64, default.splits * 2), 1}), forms
    ):
        if (per_head and (stages > 1 or (shared and batch > 8))) or (splits == 1 and context > 1024):
            continue
        tile = DecodeAttentionTile(keys, warps, stages, splits, keys, per_head)
        yield tile
        if keys == 16 and splits > 1:
            yield replace(tile, min_split=64)


def cases() -> Iterator[Case]:
    """All models, batches, contexts and tiles."""
    for shape, (batch, contexts) in itertools.product(SHAPES, CONTEXTS.items()):
        for context in contexts:
            for tile in tiles(shape, batch, context):
                name = f"{shape.name} batch {batch} context {context}"
                make = functools.partial(launches, shape, batch, context, tile)
                yield Case(name, {"tile": tile}, _bytes(shape, batch, context), make)


def _bytes(shape: Shape, batch: int, context: int) -> int:
    return batch * context * 2 * shape.num_kv_heads * shape.head_dim * _DTYPE.itemsize


if __name__ == "__main__":
    run("decode_attention", cases())
