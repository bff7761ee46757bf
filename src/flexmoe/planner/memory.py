"""Whether a plan fits into memory. Enters: machine, model, plan, tokens. Leaves: bytes of each kind, and a reason.

It is a hard bound: the rank that holds most decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe.config.engine import MAX_ROWS
from flexmoe.config.machine import Machine
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import Shard, even_share
from flexmoe.models import slices
from flexmoe.planner.operations import BITS


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of the rank that holds most. number: format of its weights. kv: of max_tokens tokens of its data rank."""

    rank: int
    number: str
    weights: int
    kv: int
    kv_per_token: int
    activations: int
    reserve: int
    capacity: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.reserve

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values have room beside all the rest; of each data rank."""
        left = self.capacity - self.weights - self.activations - self.reserve
        return max(0, left) // self.kv_per_token

    @property
    def reason(self) -> str:
        """Why it does not fit, or ""."""
        if self.fits:
            return ""
        parts = {"KV cache": self.kv, "activations": self.activations, "reserve": self.reserve}
        others = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
        words = f"weights in {self.number} {_gib(self.weights)}, {others}"
        return f"rank {self.rank} needs {_gib(self.total)} ({words}), but its device has {_gib(self.capacity)}."


def memory_use(
    machine: Machine,
    model: ModelConfig,
    plan: ParallelPlan,
    dtype: str,
    quantization: str | None,
    max_tokens: int,
    step_tokens: int,
) -> MemoryUse:
    """max_tokens: in the KV cache of each data rank; step_tokens: computed together by each."""
    ranks = _unlike_ranks(plan, model)
    weights = {rank: _weight_bytes(Shard(plan, model, rank), dtype, quantization) for rank in ranks}
    kept = {rank: _kv_per_token(Shard(plan, model, rank).local, dtype) for rank in ranks}
    rank = max(ranks, key=lambda r: weights[r] + kept[r] * max_tokens)
    share = min(plan.num_ranks, machine.devices_per_node) if machine.is_shared else 1
    return MemoryUse(
        rank=rank,
        number=quantization or dtype,
        weights=weights[rank],
        kv=kept[rank] * max_tokens,
        kv_per_token=kept[rank],
        activations=_activations(Shard(plan, model, rank), dtype, step_tokens),
        reserve=machine.reserve_bytes // share,
        capacity=machine.device.memory_bytes // share,
    )


def _unlike_ranks(plan: ParallelPlan, model: ModelConfig) -> list[int]:
    """The first rank of each kind: all others hold as much as one of these. Counting weights takes milliseconds."""
    first: dict[tuple[int, ...], int] = {}
    for rank in range(plan.num_ranks):
        shard = Shard(plan, model, rank)
        place = shard.place
        stage = [model.layers[index].is_moe for index in shard.layers]
        key = [int(place.pp == 0), int(shard.is_last_stage), len(stage), sum(stage)]
        key += [len(shard.heads), len(shard.kv_heads), len(shard.vocab), len(shard.dense_width)]
        if model.moe is not None:
            key += [
                len(shard.expert_width),
                len(even_share(model.moe.num_experts, plan.expert_parallel_size, place.ep)),
            ]
            placed = [plan.placements[index] for index in shard.layers if index in plan.placements]
            key += [sum(len(placement.slots[place.ep]) for placement in placed)]
        first.setdefault(tuple(key), rank)
    return list(first.values())


def _weight_bytes(shard: Shard, dtype: str, quantization: str | None) -> int:
    """Replicas counted each time. Quantized ones by models/quantized.py: tables in 8 bits, routers as they are."""
    numbers = slices.num_parameters(shard)
    if quantization is None:
        return round(numbers * BITS[dtype] / 8)
    tables = (len(shard.embedding) + (0 if shard.config.tie_embeddings else len(shard.head))) * shard.config.hidden_size
    return round((tables * BITS["int8"] + (numbers - tables) * BITS[quantization]) / 8)


def _kv_per_token(local: ModelConfig, dtype: str) -> int:
    a = local.attention
    return round(local.num_layers * 2 * a.num_kv_heads * a.head_dim * BITS[dtype] / 8)


def _activations(shard: Shard, dtype: str, tokens: int) -> int:
    """The most that lives at once: residual stream, and a layer's queries or its experts' rows; logits, all ranks'."""
    local, rows = shard.local, tokens * shard.plan.data_parallel_size
    widest = local.qkv_size + local.hidden_size
    if local.moe is not None:
        pairs = local.moe.top_k * (local.hidden_size + 3 * local.moe.expert_width)
        widest = max(widest, pairs + 3 * local.moe.shared_width)
    widest = max(widest, 3 * local.dense_width if any(not layer.is_moe for layer in local.layers) else 0)
    logits = 4 * min(tokens, MAX_ROWS) * shard.config.vocab_size if shard.is_last_stage else 0
    return round(rows * (2 * local.hidden_size + widest) * BITS[dtype] / 8) + logits


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
