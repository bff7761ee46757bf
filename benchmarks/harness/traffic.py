"""What ranks send in a decode step, and how unevenly they work, by the formulas of docs/parallel.md.

Enters: a plan, and the experts that one process was seen to choose. Leaves: bytes a token by label, ratios.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexmoe.config.layout import RankLayout
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import block_share

Row = dict[str, Any]
Bytes = dict[str, float]

_COUNT_BYTES, _BEST_BYTES, _ROUTING_BYTES = 8, 8, 4  # int64s, and each slot and weight of a token sent
_SQUARES_BYTES = 8  # of a row's queries and of its keys, fp32


class Choices:
    """A probe that keeps the experts which each MoE layer chose in decode steps of `rows` rows: [rows, K] each."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.by_layer: dict[int, list[Tensor]] = {}

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        if stage == "topk_ids" and len(tensor) == self._rows:
            self.by_layer.setdefault(layer, []).append(tensor.to("cpu", torch.int64, copy=True))


def formula(
    config: ModelConfig, plan: ParallelPlan, batch: int, itemsize: int, choices: Choices, *, fused: bool = False,
    one_shot: bool = False,
) -> Bytes:  # fmt: skip
    """Bytes by label that all ranks send for a token of a decode step, if experts are chosen like that.

    fused: each rank sends the others the best of its words, and not the first one all. one_shot: each sends the others
    its whole part of a sum.
    """
    P, H = plan.num_ranks, config.hidden_size
    moe_layers = sum(layer.is_moe for layer in config.layers)
    all_reduce = (P if one_shot else 2) * (P - 1) * H * itemsize
    sent: Bytes = {
        "embedding": all_reduce,
        "linear": (2 * config.num_layers - moe_layers) * all_reduce,  # attention, and dense feed-forwards
        "logits": P * (P - 1) * _BEST_BYTES if fused else (P - 1) * -(-config.vocab_size // P) * itemsize,
    }
    if config.attention.qk_norm == "full":
        sent["qk_norm"] = config.num_layers * (P if one_shot else 2) * (P - 1) * _SQUARES_BYTES
    if not plan.uses_all_to_all:
        return sent | {"combine": moe_layers * all_reduce}
    assert config.moe is not None
    ep, etp, row = plan.expert_parallel_size, plan.expert_tensor_size, H * itemsize
    away, copies = _copies(config, plan, choices)
    routing = 2 * config.moe.top_k * _ROUTING_BYTES
    sent |= {
        "counts": moe_layers * P * (ep - 1 + etp - 1) * _COUNT_BYTES / batch,
        "dispatch": away * row,
        "combine": away * row,
        "routing": (away + copies * (etp - 1)) * routing,
        "rows": moe_layers * P * (P - 1) * -(-batch // P) * row / batch,
    }
    if etp > 1:
        sent |= {"slice_dispatch": copies * (etp - 1) * row, "slice_combine": copies * (etp - 1) * row}
    return sent


def _copies(config: ModelConfig, plan: ParallelPlan, choices: Choices) -> tuple[float, float]:
    """Of a token, summed over layers: copies that go to other ep ranks, and all that an ep rank computes (D)."""
    layout, away, total, tokens = RankLayout(plan), 0, 0, 0
    for layer, steps in choices.by_layer.items():
        for chosen in steps:
            goes = _targets(config, plan, layer, chosen)  # [T, ep]
            owners = torch.zeros(len(chosen), dtype=torch.int64)
            for rank in range(plan.num_ranks):
                share = block_share(len(chosen), plan.num_ranks, rank)
                owners[share.start : share.stop] = layout.coordinates(rank).ep
            total += int(goes.sum())
            away += int(goes.sum()) - int(goes.gather(1, owners[:, None]).sum())
            tokens += len(chosen)
    rows = max(1, tokens) / max(1, len(choices.by_layer))
    return away / rows, total / rows


def _rank_of(config: ModelConfig, plan: ParallelPlan, layer: int) -> Tensor:
    """[E] the ep rank of each expert; placements without replicas only."""
    assert config.moe is not None
    placement = plan.placement(config.moe.num_experts, layer)
    return torch.tensor([placement.replicas(expert)[0][0] for expert in range(config.moe.num_experts)])


def _targets(config: ModelConfig, plan: ParallelPlan, layer: int, chosen: Tensor) -> Tensor:
    """chosen [T, K] -> [T, ep]: which ranks hold some expert of each row."""
    return (_rank_of(config, plan, layer)[chosen][..., None] == torch.arange(plan.expert_parallel_size)).any(1)


def imbalance(config: ModelConfig, plan: ParallelPlan, choices: Choices) -> Row:
    """Most loaded ep rank over the mean, averaged over layers: of the choices of all steps, and of each step."""
    if not choices.by_layer:
        return {"run": 1.0, "step": 1.0}
    runs, steps = [], []
    for layer, seen in choices.by_layer.items():
        ranks = _rank_of(config, plan, layer)
        loads = torch.stack([torch.bincount(ranks[c].flatten(), minlength=plan.expert_parallel_size) for c in seen])
        runs.append(_over_mean(loads.sum(0)))
        steps += [_over_mean(load) for load in loads]
    return {"run": round(sum(runs) / len(runs), 3), "step": round(sum(steps) / len(steps), 3)}


def _over_mean(load: Tensor) -> float:
    return float(load.max() / load.double().mean())
