"""What `flexmoe tune` times, experts apart: projections, decode attention and the router, each for a number of rows.

Enters: a ModelConfig. Leaves: jobs, each with the tiles that compete and with inputs as a step has them: random, of the
model's shape, and in so many rotating sets that no cache still holds the weights, or the keys, that a launch reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexmoe.bench import tune_candidates as candidates
from flexmoe.bench.kernel_timer import Launch
from flexmoe.config.model import ModelConfig
from flexmoe.kernels.decode_attention import DecodeRows, QKNormWeights
from flexmoe.kernels.triton import norm_linear
from flexmoe.kernels.triton.decode_attention import decode_attention, workspace_shapes
from flexmoe.kernels.triton.decode_attention import default_tile as default_attention
from flexmoe.kernels.triton.route import default_tile as default_route
from flexmoe.kernels.triton.route import route
from flexmoe.kernels.triton.tiles import Work, attention_work, linear_work, route_work

_ROTATE = 192 << 20  # bytes that the sets read together, at least: three times the L2 cache
_MOST_SETS = 1024
_BLOCK = 16  # tokens of a KV block
_CONTEXTS = (256, 1024, 4096)
_MOST_KEYS = 256 * 1024  # of all rows together: memory
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Inputs:
    """Buffers for one job. launches: for a tile, a closure for each set of buffers. out: what the first one writes.

    start: what `out` holds before: 0 where it is added to, else NaN. moved: bytes a launch, at least.
    """

    launches: Callable[[Any], list[Launch]]
    out: Tensor
    start: float
    moved: float


@dataclass(frozen=True, slots=True)
class Job:
    """One work for one number of rows. name: for people. parts: makers of inputs; a tile must do for all of them."""

    name: str
    work: Work
    rows: int
    default: Any
    candidates: Sequence[Any]
    parts: Sequence[Callable[[], Inputs]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all jobs of a run share. pdl: launches may overlap, as in a decode step."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    pdl: bool

    def sets(self, read: int) -> int:
        """How many sets of buffers rotate if a launch reads so many bytes of each."""
        return max(2, min(_MOST_SETS, -(-_ROTATE // read)))

    def normal(self, *shape: int, dtype: torch.dtype | None = None, std: float = 1.0) -> Tensor:
        """Random numbers on the device."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device).normal_(std=std)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory on the device."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class _Linear:
    """One projection [n, k]: it norms the residual stream, adds to it, or neither. wide: its result is fp32."""

    name: str
    n: int
    k: int
    norm: bool = False
    residual: bool = False
    wide: bool = False


def _linears(config: ModelConfig) -> Iterator[_Linear]:
    hidden, a = config.hidden_size, config.attention
    yield _Linear("qkv", config.qkv_size, hidden, norm=True)
    yield _Linear("o_proj", hidden, a.num_heads * a.head_dim, residual=True)
    shared = config.moe.shared_width if config.moe else 0
    dense = 0 if all(layer.is_moe for layer in config.layers) else config.dense_width
    for name, width in (("mlp", dense), ("shared", shared)):
        if width:
            yield _Linear(f"{name} gate_up", 2 * width, hidden)
            yield _Linear(f"{name} down", hidden, width, residual=True)
    yield _Linear("lm_head", config.vocab_size, hidden, norm=True, wide=True)


def linear_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    dtype = setting.dtype
    for linear in _linears(setting.config):
        n, k = linear.n, linear.k
        default = norm_linear.default_tile(rows, n, k, dtype)
        tiles = list(candidates.linear_tiles(rows, n, k, norm=linear.norm, itemsize=dtype.itemsize))
        work = linear_work(dtype, n, k, norm=linear.norm)
        yield Job(linear.name, work, rows, default, tiles, [functools.partial(_linear_inputs, setting, rows, linear)])


def _linear_inputs(setting: Setting, rows: int, linear: _Linear) -> Inputs:
    n, k, dtype = linear.n, linear.k, setting.dtype
    x = setting.normal(rows, k, dtype=torch.float32 if linear.norm else dtype)
    norm_weight = setting.normal(k) if linear.norm else None
    out = setting.empty(rows, n, dtype=torch.float32 if linear.wide or linear.residual else dtype)
    weights = [setting.normal(n, k, std=k**-0.5) for _ in range(setting.sets(n * k * dtype.itemsize))]

    def launches(tile: norm_linear.Tile) -> list[Launch]:
        size = norm_linear.scratch_bytes(rows, n, k, dtype, norm=linear.norm, tile=tile)
        scratch = setting.empty(size, dtype=torch.uint8)
        return [
            functools.partial(
                norm_linear.norm_linear, x, weight, out, norm_weight=norm_weight, eps=_EPS, residual=linear.residual,
                scratch=scratch, tile=tile, pdl=setting.pdl,
            )
            for weight in weights
        ]  # fmt: skip

    moved = n * k * dtype.itemsize + rows * (k * x.itemsize + n * out.itemsize * (2 if linear.residual else 1))
    return Inputs(launches, out, 0.0 if linear.residual else torch.nan, moved)


def attention_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    a = setting.config.attention
    default = default_attention(rows, a.num_heads, a.num_kv_heads, a.head_dim, dtype=setting.dtype)
    tiles = list(candidates.attention_tiles(rows, a.num_heads, a.num_kv_heads, default, setting.dtype.itemsize))
    contexts = [context for context in _CONTEXTS if context * rows <= _MOST_KEYS] or [_CONTEXTS[0]]
    parts = [functools.partial(_attention_inputs, setting, rows, context) for context in contexts]
    yield Job("attention", attention_work(setting.dtype, a), rows, default, tiles, parts)


def _attention_inputs(setting: Setting, rows: int, context: int) -> Inputs:
    a, dtype, device = setting.config.attention, setting.dtype, setting.device
    read = rows * context * 2 * a.num_kv_heads * a.head_dim * dtype.itemsize
    blocks, sets = -(-context // _BLOCK), setting.sets(read)
    cache = setting.normal(sets * rows * blocks * _BLOCK, 2, a.num_kv_heads, a.head_dim)
    tables = torch.randperm(sets * rows * blocks, device=device).int().view(sets, -1)
    lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
    stride = torch.tensor([blocks], dtype=torch.int32, device=device)
    qkv, out = setting.normal(rows, setting.config.qkv_size), setting.empty(rows, a.num_heads * a.head_dim)
    angles = torch.rand(context, a.rope.rotary_dim // 2, device=device) * 6.3
    cos, sin = angles.cos(), angles.sin()
    norm = None
    if a.qk_norm != "none":
        widths = (a.num_heads, a.num_kv_heads) if a.qk_norm == "full" else (1, 1)
        query, key = (setting.normal(width * a.head_dim) for width in widths)
        norm = QKNormWeights(query, key, _EPS, full=a.qk_norm == "full")

    def launches(tile: Any) -> list[Launch]:
        shapes = workspace_shapes(rows, a.num_heads, a.head_dim, tile.splits)
        workspace = setting.empty(*shapes[0], dtype=torch.float32), setting.empty(*shapes[1], dtype=torch.float32)
        return [
            functools.partial(
                decode_attention, qkv, cache, DecodeRows(lengths, table, stride, _BLOCK), cos, sin, out, norm=norm,
                clip=a.clip_qkv, workspace=workspace, tile=tile, pdl=setting.pdl,
            )
            for table in tables
        ]  # fmt: skip

    return Inputs(launches, out, torch.nan, read)


def route_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    moe, hidden, size = setting.config.moe, setting.config.hidden_size, setting.dtype.itemsize
    if moe is None:
        return
    default = default_route(rows, hidden, moe.num_experts, size)
    tiles = list(candidates.route_tiles(rows, hidden, moe.num_experts, size))
    work = route_work(setting.dtype, hidden, moe)
    yield Job("router", work, rows, default, tiles, [functools.partial(_route_inputs, setting, rows)])


def _route_inputs(setting: Setting, rows: int) -> Inputs:
    assert setting.config.moe is not None
    hidden, experts = setting.config.hidden_size, setting.config.moe.num_experts
    sets = setting.sets(hidden * experts * setting.dtype.itemsize)
    weights = setting.normal(sets, experts, hidden, std=hidden**-0.5)
    x, norm_weight = setting.normal(rows, hidden, dtype=torch.float32), setting.normal(hidden)
    normed, logits = setting.empty(rows, hidden), setting.empty(rows, experts, dtype=torch.float32)

    def launches(tile: Any) -> list[Launch]:
        return [
            functools.partial(route, x, norm_weight, _EPS, weight, normed, logits, tile=tile, pdl=setting.pdl)
            for weight in weights
        ]

    moved = weights[0].nbytes + x.nbytes + normed.nbytes + logits.nbytes
    return Inputs(launches, logits, torch.nan, moved)
