"""What `flexmoe tune` times of experts: their two halves, for few rows and grouped, and whole ways against each other.

Enters: a ModelConfig with experts. Leaves: jobs, and closures that run all of a layer's expert launches. Routing is
random and even; bytes count the experts that it really chose.
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
from flexmoe.bench.tune_jobs import Inputs, Job, Setting
from flexmoe.config.model import MoEConfig
from flexmoe.kernels.triton import expert_down, expert_gate_up
from flexmoe.kernels.triton.combine import combine
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.kernels.triton.tiles import expert_work
from flexmoe.kernels.triton.topk import topk
from flexmoe.kernels.triton.topk_by_expert import topk_by_expert
from flexmoe.models.fused_tiles import StepTiles

FEW_ROWS = 16  # beyond these no launch of an expert for each row can win
_FEWEST_SETS = 4  # of routing: one choice of experts is not like another


@dataclass(frozen=True, slots=True)
class ExpertSet:
    """A layer's experts and what T rows bring to them."""

    x: Tensor  # [T, H]
    logits: Tensor  # [T, E] fp32
    lengths: Tensor  # [T]
    ids: Tensor  # [T, K]
    weights: Tensor  # [T, K] fp32
    rows: Tensor  # [E, T]
    counts: Tensor  # [E]
    gate_up: Tensor  # [E, 2F, H]
    hidden: Tensor  # [T*K, F]
    down: Tensor  # [E, H, F]
    y: Tensor  # [T*K, H]
    out: Tensor  # [T, H] fp32


def expert_sets(setting: Setting, rows: int) -> list[ExpertSet]:
    """Sets with the experts of so many layers that no cache holds what one set reads, if memory allows."""
    moe, hidden = _moe(setting), setting.config.hidden_size
    matrix = hidden * moe.expert_width * setting.dtype.itemsize
    touched = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** rows)
    layers = setting.sets(int(touched * matrix))
    if setting.device.type == "cuda":
        free = torch.cuda.mem_get_info(setting.device)[0]
        layers = max(1, min(layers, free // 2 // (3 * matrix * moe.num_experts)))
    made: list[ExpertSet] = []
    for _ in range(layers):
        gate_up = setting.normal(moe.num_experts, 2 * moe.expert_width, hidden, std=hidden**-0.5)
        down = setting.normal(moe.num_experts, hidden, moe.expert_width, std=moe.expert_width**-0.5)
        made += [_routed(setting, rows, gate_up, down) for _ in range(-(-_FEWEST_SETS // layers))]
    return made


def routing_sets(setting: Setting, rows: int) -> list[ExpertSet]:
    """One set whose experts are empty: what choosing and listing experts needs."""
    return [_routed(setting, rows, setting.empty(0), setting.empty(0))]


def _routed(setting: Setting, rows: int, gate_up: Tensor, down: Tensor) -> ExpertSet:
    moe, hidden, device = _moe(setting), setting.config.hidden_size, setting.device
    logits = setting.normal(rows, moe.num_experts, dtype=torch.float32)
    ids = setting.empty(rows, moe.top_k, dtype=torch.int32)
    weights = setting.empty(rows, moe.top_k, dtype=torch.float32)
    lists = setting.empty(moe.num_experts, rows, dtype=torch.int32)
    counts = setting.empty(moe.num_experts, dtype=torch.int32)
    topk(logits, ids, weights, renormalize=moe.renormalize)
    group_by_expert(ids, moe.num_experts, lists, counts)
    return ExpertSet(
        setting.normal(rows, hidden), logits, torch.ones(rows, dtype=torch.int32, device=device), ids, weights, lists,
        counts, gate_up, setting.normal(rows * moe.top_k, moe.expert_width), down,
        setting.empty(rows * moe.top_k, hidden), torch.zeros(rows, hidden, device=device),
    )  # fmt: skip


def few_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    """Both halves for few rows."""
    config, size = setting.config, setting.dtype.itemsize
    if config.moe is None or rows > FEW_ROWS:
        return
    hidden, moe = config.hidden_size, config.moe
    first = expert_gate_up.default_gemv_tile(hidden, setting.dtype)
    second = expert_down.default_gemv_tile(moe.top_k, moe.expert_width, setting.dtype)
    gate_up_tiles = list(candidates.gate_up_gemv_tiles(hidden, size))
    down_tiles = list(candidates.down_gemv_tiles(moe.expert_width, moe.top_k, size))
    yield _job(setting, rows, "expert_gate_up_gemv", first, gate_up_tiles, gate_up_gemv)
    yield _job(setting, rows, "expert_down_gemv", second, down_tiles, down_gemv)


def many_jobs(setting: Setting, rows: int) -> Iterator[Job]:
    """Both halves, grouped."""
    config, size = setting.config, setting.dtype.itemsize
    if config.moe is None:
        return
    shape = (rows, config.moe.top_k, config.moe.num_experts, config.hidden_size, config.moe.expert_width, setting.dtype)
    first, second = expert_gate_up.default_tile(*shape), expert_down.default_tile(*shape)
    gate_up_tiles = list(candidates.gate_up_tiles(first, size))
    down_tiles = list(candidates.down_tiles(second, size))
    yield _job(setting, rows, "expert_gate_up_grouped", first, gate_up_tiles, gate_up_grouped)
    yield _job(setting, rows, "expert_down_grouped", second, down_tiles, down_grouped)


Half = Callable[[Setting, ExpertSet, Any], None]


def _job(setting: Setting, rows: int, op: str, default: Any, tiles: Sequence[Any], launch: Half) -> Job:
    work = expert_work(op, setting.dtype, setting.config.hidden_size, _moe(setting))
    part = functools.partial(_inputs, setting, rows, op, launch)
    return Job(op.removeprefix("expert_"), work, rows, default, tiles, [part])


def _inputs(setting: Setting, rows: int, op: str, launch: Half) -> Inputs:
    sets = expert_sets(setting, rows)

    def launches(tile: Any) -> list[Launch]:
        return [functools.partial(launch, setting, s, tile) for s in sets]

    first = op.startswith("expert_gate_up")
    out = sets[0].hidden if first else sets[0].out if op.endswith("_gemv") else sets[0].y
    matrices = sum(float((s.counts > 0).sum()) for s in sets) / len(sets) * (2 if first else 1)
    per_matrix = sets[0].down[0].nbytes
    passed = (sets[0].x if first else sets[0].out).nbytes + sets[0].hidden.nbytes
    return Inputs(launches, out, 0.0 if out is sets[0].out else torch.nan, matrices * per_matrix + passed)


def gate_up_gemv(setting: Setting, s: ExpertSet, tile: Any) -> None:
    """The first half for few rows, which chooses the experts."""
    expert_gate_up.expert_gate_up_gemv(
        s.x, s.logits, s.ids, s.weights, s.gate_up, s.hidden,
        renormalize=_moe(setting).renormalize, lengths=s.lengths, tile=tile, pdl=setting.pdl,
    )  # fmt: skip


def down_gemv(setting: Setting, s: ExpertSet, tile: Any) -> None:
    """The second half for few rows."""
    expert_down.expert_down_gemv(
        s.hidden, s.ids, s.weights, s.down, s.out, logits=s.logits, lengths=s.lengths, tile=tile, pdl=setting.pdl
    )


def gate_up_grouped(setting: Setting, s: ExpertSet, tile: Any) -> None:
    """The first half, grouped."""
    top_k = s.ids.shape[1]
    expert_gate_up.expert_gate_up_grouped(
        s.x, s.rows, s.counts, s.gate_up, s.hidden, top_k=top_k, tile=tile, pdl=setting.pdl
    )


def down_grouped(setting: Setting, s: ExpertSet, tile: Any) -> None:
    """The second half, grouped."""
    expert_down.expert_down_grouped(s.hidden, s.rows, s.counts, s.weights, s.down, s.y, tile=tile, pdl=setting.pdl)


def few_experts(setting: Setting, s: ExpertSet, tiles: StepTiles) -> None:
    """All of a layer's experts for few rows: two launches."""
    first, second = tiles.few_experts(len(s.x))
    gate_up_gemv(setting, s, first)
    down_gemv(setting, s, second)


def many_experts(setting: Setting, s: ExpertSet, tiles: StepTiles) -> None:
    """All of a layer's experts, grouped: four launches, or five."""
    group_in_one(setting, s) if tiles.groups_in_one(len(s.x), len(s.counts)) else group_in_two(setting, s)
    first, second = tiles.many_experts(len(s.x))
    gate_up_grouped(setting, s, first)
    down_grouped(setting, s, second)
    combine(s.y, s.ids, s.out, accumulate=True, pdl=setting.pdl)


def group_in_one(setting: Setting, s: ExpertSet) -> None:
    """Choose and list in one launch."""
    renormalize = _moe(setting).renormalize
    topk_by_expert(
        s.logits, s.ids, s.weights, s.rows, s.counts, renormalize=renormalize, lengths=s.lengths, pdl=setting.pdl
    )


def group_in_two(setting: Setting, s: ExpertSet) -> None:
    """Choose, then list."""
    topk(s.logits, s.ids, s.weights, renormalize=_moe(setting).renormalize, lengths=s.lengths, pdl=setting.pdl)
    group_by_expert(s.ids, len(s.counts), s.rows, s.counts, pdl=setting.pdl)


def _moe(setting: Setting) -> MoEConfig:
    assert setting.config.moe is not None
    return setting.config.moe
