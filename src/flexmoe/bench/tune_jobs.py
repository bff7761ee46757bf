"""What `flexmoe tune` has to decide: for each operation of a model's decode steps and a number of rows, which tile.

Enters: a ModelConfig. Leaves: jobs with the tiles that compete, and bytes that a step reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexmoe.bench import tune_candidates as candidates
from flexmoe.bench.tune_step import Stage
from flexmoe.config.model import ModelConfig
from flexmoe.kernels.triton import expert_down, expert_gate_up
from flexmoe.kernels.triton.route import default_tile as default_route
from flexmoe.kernels.triton.tiles import TileTable, Work, attention_work, expert_work, linear_work, route_work
from flexmoe.models.fused_tiles import StepTiles

_MOST_ALONE = 8  # rows; with more, reading an expert for each row alone has not won
_LEAST_GROUPED = 4  # rows; with fewer, grouping them has not


@dataclass(frozen=True, slots=True)
class Job:
    """One work for one number of rows. name: for people. stage: where its result shows. long: of thousands of keys."""

    name: str
    work: Work
    rows: int
    default: Any
    candidates: Sequence[Any]
    stage: Stage
    long: bool = False

    @property
    def head(self) -> bool:
        """Whether it is the head's projection, which is tuned apart."""
        return self.stage == "logits"


@dataclass(frozen=True, slots=True)
class Setting:
    """What jobs are made for."""

    config: ModelConfig
    dtype: torch.dtype

    @property
    def untuned(self) -> StepTiles:
        """The operations' own choices."""
        return StepTiles(TileTable(), self.config, self.dtype)


def linear_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    """The dense projections; one job for those of one shape."""
    config, a = setting.config, setting.config.attention
    hidden, heads = config.hidden_size, a.num_heads * a.head_dim
    yield _linear(setting, rows, "qkv", config.qkv_size, hidden, "attention", norm=True)
    yield _linear(setting, rows, "o_proj", hidden, heads, "attention")
    shared = config.moe.shared_width if config.moe else 0
    dense = 0 if any(layer.is_moe for layer in config.layers) else config.dense_width
    for name, width in (("shared", shared), ("mlp", dense)):
        if width:
            yield _linear(setting, rows, f"{name} gate_up", 2 * width, hidden, "feed")
            yield _linear(setting, rows, f"{name} down", hidden, width, "feed")
    yield _linear(setting, rows, "lm_head", config.vocab_size, hidden, "logits", norm=True)


def _linear(setting: Setting, rows: int, name: str, n: int, k: int, stage: Stage, *, norm: bool = False) -> Job:
    default = setting.untuned.linear(rows, n, k, norm=norm)
    tiles = list(candidates.linear_tiles(rows, n, k, norm=norm, itemsize=setting.dtype.itemsize))
    return Job(name, linear_work(setting.dtype, n, k, norm=norm), rows, default, tiles, stage)


def attention_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    """Decode attention over hundreds of keys, and over thousands."""
    a = setting.config.attention
    for name, long in (("attention", False), ("attention long", True)):
        default, work = setting.untuned.attention(rows, long=long), attention_work(setting.dtype, a, long=long)
        tiles = list(candidates.attention_tiles(rows, a.num_heads, a.num_kv_heads, default, setting.dtype.itemsize))
        yield Job(name, work, rows, default, tiles, "attention", long)


def route_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    """The norm and the router, whose weight is taken to be exact in the model's dtype, as checkpoints have it."""
    moe, hidden, size = setting.config.moe, setting.config.hidden_size, setting.dtype.itemsize
    if moe is None:
        return
    default = default_route(rows, hidden, moe.num_experts, size)
    tiles = list(candidates.route_tiles(rows, hidden, moe.num_experts, size))
    yield Job("router", route_work(setting.dtype, hidden, moe), rows, default, tiles, "router")


def few_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    """Both halves of the experts for few rows."""
    config, size = setting.config, setting.dtype.itemsize
    if config.moe is None or rows > _MOST_ALONE:
        return
    first, second = setting.untuned.few_experts(rows)
    gate_up = list(candidates.gate_up_gemv_tiles(config.hidden_size, size))
    down = list(candidates.down_gemv_tiles(config.moe.expert_width, config.moe.top_k, size))
    yield _expert(setting, rows, "expert_gate_up_gemv", first, gate_up)
    yield _expert(setting, rows, "expert_down_gemv", second, down)


def many_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    """Both halves of the experts, grouped."""
    config, size = setting.config, setting.dtype.itemsize
    if config.moe is None or rows < _LEAST_GROUPED:
        return
    shape = (rows, config.moe.top_k, config.moe.num_experts, config.hidden_size, config.moe.expert_width, setting.dtype)
    first, second = expert_gate_up.default_tile(*shape), expert_down.default_tile(*shape)
    yield _expert(setting, rows, "expert_gate_up_grouped", first, list(candidates.gate_up_tiles(first, size)))
    yield _expert(setting, rows, "expert_down_grouped", second, list(candidates.down_tiles(second, size)))


def _expert(setting: Setting, rows: int, op: str, default: Any, tiles: Sequence[Any]) -> Job:
    assert setting.config.moe is not None
    work = expert_work(op, setting.dtype, setting.config.hidden_size, setting.config.moe)
    return Job(op.removeprefix("expert_"), work, rows, default, tiles, "feed")


JOBS: dict[str, Callable[[Setting, int], Iterator[Job]]] = {
    "norm_linear": linear_jobs,
    "decode_attention": attention_jobs,
    "route": route_jobs,
    "expert_gate_up_gemv": few_jobs,
    "expert_down_gemv": few_jobs,
    "expert_gate_up_grouped": many_jobs,
    "expert_down_grouped": many_jobs,
}


def jobs(setting: Setting, rows: int, ops: Sequence[str]) -> Iterator[Job]:
    """All jobs of the operations asked for."""
    for op, make in JOBS.items():
        if op in ops:
            yield from (job for job in make(setting, rows) if job.work.op == op)
