"""CostModel: what a step takes. Enters: a machine, a model, a plan, and the rows of a step. Leaves: seconds by term.

A step is a pass of decodes and a pass of prompts, as `engine/model_runner.py` makes them. Of the ranks that compute a
layer together the one with most to do counts, since the others wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flexmoe.config.layout import RankLayout
from flexmoe.config.machine import Machine
from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.shard import Shard, check
from flexmoe.planner.collectives import exchange_seconds
from flexmoe.planner.lookup import Lookup
from flexmoe.planner.memory import MemoryUse, memory_use
from flexmoe.planner.operations import BITS, Operation
from flexmoe.planner.routing import Load, Routing, expert_loads

TERMS = (
    "attention projections", "attention", "router", "experts", "dense", "combine", "head", "all-reduce", "all-to-all",
    "host", "pipeline",
)  # fmt: skip
_FUSED_ROWS = {"cuda": 256, "cpu": 64}  # of decodes that the fused kernels take
_WORTH_TORCH = {"float32": 400e6, "bfloat16": 200e6}  # multiply-adds a layer, see models/native.py
_LEAST_ROWS = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """So many tokens of a prompt, computed in one step, behind `cached` ones."""

    tokens: int
    cached: int = 0


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one data rank computes in a step; the others are taken to have as much.

    decodes: rows of one token each. context: the mean of tokens that each of them sees. chunks: of prompts.
    """

    decodes: int = 0
    context: float = 0.0
    chunks: tuple[Chunk, ...] = ()

    @classmethod
    def of(cls, contexts: Iterable[int] = (), chunks: Iterable[Chunk] = ()) -> StepShape:
        """With the context of each decode."""
        seen = tuple(contexts)
        return cls(len(seen), sum(seen) / max(1, len(seen)), tuple(chunks))

    @property
    def tokens(self) -> int:
        return self.decodes + sum(chunk.tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of each of TERMS that there are. extrapolated: terms that reach beyond what was measured."""

    terms: Mapping[str, float] = field(default_factory=dict)
    extrapolated: frozenset[str] = frozenset()

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    def plus(self, other: StepCost) -> StepCost:
        """One after the other."""
        return self.plus_scaled(other, 1.0)

    def plus_scaled(self, other: StepCost, times: float) -> StepCost:
        """This and the other one so many times."""
        terms = dict(self.terms)
        for name, seconds in other.terms.items():
            terms[name] = terms.get(name, 0.0) + seconds * times
        return StepCost(terms, self.extrapolated | other.extrapolated)


@dataclass(frozen=True, slots=True)
class _Pass:
    """Rows that go through the layers together."""

    path: str
    rows: int
    sampled: int
    decodes: int
    context: int
    chunks: tuple[Chunk, ...]


class CostModel:
    """Predicts steps and memory of one model in one plan on one machine. Raises ConfigError if they do not fit."""

    def __init__(
        self,
        machine: Machine,
        model: ModelConfig,
        plan: ParallelPlan,
        *,
        dtype: str = "bfloat16",
        quantization: str | None = None,
        routing: Routing | None = None,
    ) -> None:
        """dtype: of all that is not quantized. routing: how rows choose experts; None: all are as likely."""
        check(plan, model)
        self.machine, self.model, self.plan, self.dtype = machine, model, plan, dtype
        self.quantization = quantization
        per_node = min(plan.num_ranks, machine.devices_per_node) if machine.nodes > 1 else plan.num_ranks
        self._lookup = Lookup(machine, dtype, quantization, per_node if machine.is_shared else 1)
        self._group = functools.cache(RankLayout(plan).group)
        self._routing = routing or Routing()
        self._fixed = functools.lru_cache(maxsize=4096)(self._without_attention)

    def step(self, shape: StepShape) -> StepCost:
        """Of the whole step, until its tokens are known."""
        cost = StepCost({"host": self.machine.device.host_s})
        for each in self._passes(shape):
            cost = cost.plus(self._fixed(each.path, each.rows, each.sampled)).plus(self._attention(each))
        return cost

    def memory(self, max_tokens: int, step_tokens: int = 2048) -> MemoryUse:
        """With so many tokens in the KV cache of each data rank, and so many computed together."""
        return memory_use(
            self.machine, self.model, self.plan, self.dtype, self.quantization, max_tokens, step_tokens
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ passes

    def _passes(self, shape: StepShape) -> list[_Pass]:
        """Decodes that have a path of their own, and all the rest."""
        context, decodes = max(1, round(shape.context)), shape.decodes
        fused = 0 < decodes <= self._most_fused()
        found = [_Pass("fused", decodes, decodes, decodes, context, ())] if fused else []
        rest = 0 if fused else decodes
        rows = rest + sum(chunk.tokens for chunk in shape.chunks)
        if rows:
            found.append(_Pass("torch", rows, rest + len(shape.chunks), rest, context, shape.chunks))
        return found

    def _most_fused(self) -> int:
        """Decodes up to which the fused kernels take them; 0 where they are not used at all."""
        plan, most = self.plan, _FUSED_ROWS[self.machine.device.kind]
        if self.machine.device.kind == "cuda":
            spread = plan.uses_all_to_all or plan.pipeline_parallel_size > 1 or plan.data_parallel_size > 1
            return 0 if spread else most
        if plan.num_ranks > 1 or self.dtype not in _WORTH_TORCH:
            return 0
        if self.quantization is not None:
            return most
        model = self.model
        weights = model.num_active_parameters() - model.vocab_size * model.hidden_size
        return int(min(max(_WORTH_TORCH[self.dtype] / (weights / model.num_layers), _LEAST_ROWS), most))

    # ------------------------------------------------------------------------------------------------ terms

    def _without_attention(self, path: str, rows: int, sampled: int) -> StepCost:
        """All that does not depend on contexts, on all stages."""
        cost = StepCost()
        for stage in range(self.plan.pipeline_parallel_size):
            shard = Shard(self.plan, self.model, stage * self.plan.stage_size)
            for (layer, placement), count in self._kinds(shard).items():
                cost = cost.plus_scaled(self._layer(path, shard, layer, placement, rows), count)
        return cost.plus(self._ends(path, rows, sampled))

    def _kinds(self, shard: Shard) -> dict[tuple[LayerConfig, ExpertPlacement | None], int]:
        """Layers of a stage that cost the same, and how many of each there are."""
        found: dict[tuple[LayerConfig, ExpertPlacement | None], int] = {}
        for index in shard.layers:
            layer, moe = self.model.layers[index], self.model.moe
            is_moe = layer.is_moe and moe is not None
            key = layer, self.plan.placement(moe.num_experts, index) if is_moe and moe is not None else None
            found[key] = found.get(key, 0) + 1
        return found

    def _layer(
        self, path: str, shard: Shard, layer: LayerConfig, placement: ExpertPlacement | None, rows: int
    ) -> StepCost:
        """One layer without its attention proper, and what its ranks exchange."""
        local, hidden = shard.local, self.model.hidden_size
        out = Operation("linear", rows, (hidden, local.attention.num_heads * local.attention.head_dim))
        cost = self._price(path, "attention projections", Operation("linear", rows, (local.qkv_size, hidden)), out)
        if not layer.is_moe or local.moe is None or placement is None:
            cost = cost.plus(self._dense(path, local.dense_width, rows))
            return cost.plus(self._all_reduce(path, "tp", shard, 2 * rows * hidden))
        cost = cost.plus(self._all_reduce(path, "tp", shard, rows * hidden))
        return cost.plus(self._experts(path, shard, placement, rows)).plus(self._exchange(path, shard, placement, rows))

    def _experts(self, path: str, shard: Shard, placement: ExpertPlacement, rows: int) -> StepCost:
        moe, hidden, everyone = shard.local.moe, self.model.hidden_size, rows * self.plan.data_parallel_size
        assert moe is not None
        load = self._load(placement, everyone)
        here = everyone if self.plan.uses_all_to_all is False else max(1, round(load.pairs / moe.top_k))
        cost = self._price(path, "router", Operation("router", rows, (moe.num_experts, hidden, moe.top_k)))
        if load.active:
            pairs, active = max(1, round(load.pairs)), max(1, round(load.active))
            cost = cost.plus(
                self._price(path, "experts", Operation("experts", pairs, (active, hidden, moe.expert_width)))
            )
        cost = cost.plus(self._price(path, "combine", Operation("combine", here, (moe.top_k, hidden))))
        return cost.plus(self._dense(path, moe.shared_width, rows)) if moe.shared_width else cost

    def _load(self, placement: ExpertPlacement, rows: int) -> Load:
        assert self.model.moe is not None
        return expert_loads(self.model.moe, placement, self._routing).load(rows)

    def _dense(self, path: str, width: int, rows: int) -> StepCost:
        hidden = self.model.hidden_size
        up, down = Operation("linear", rows, (2 * width, hidden)), Operation("linear", rows, (hidden, width))
        return self._price(path, "dense", up, down)

    def _attention(self, each: _Pass) -> StepCost:
        """Of all layers, on all stages."""
        cost = StepCost()
        for stage in range(self.plan.pipeline_parallel_size):
            shard = Shard(self.plan, self.model, stage * self.plan.stage_size)
            a = shard.local.attention
            sizes = a.num_heads, a.num_kv_heads, a.head_dim
            windows = [self.model.layers[index].window for index in shard.layers]
            for window in set(windows):
                seen = each.context if window is None else min(each.context, window)
                operations = [Operation("attention", each.decodes, (seen, *sizes))] if each.decodes else []
                operations += [Operation("prompt", c.tokens, (c.cached, *sizes)) for c in each.chunks]
                cost = cost.plus_scaled(self._price(each.path, "attention", *operations), windows.count(window))
        return cost

    def _ends(self, path: str, rows: int, sampled: int) -> StepCost:
        """Embedding, head, the logits' way to whom samples, and from stage to stage."""
        plan, hidden, last = self.plan, self.model.hidden_size, self.plan.num_ranks - self.plan.stage_size
        first, shard = Shard(plan, self.model, 0), Shard(plan, self.model, last)
        words = len(shard.vocab)
        cost = self._price(path, "head", Operation("linear", sampled, (words, hidden))) if sampled else StepCost()
        cost = cost.plus(self._all_reduce(path, "tp", first, rows * hidden))
        numbers = 8 * rows / (BITS[self.dtype] / 8) if path == "fused" else sampled * words
        group = self._group("tp", last)
        gathered = self._collective(path, "all_gather", group, numbers * len(group))
        stages = plan.pipeline_parallel_size
        sends = (stages - 1) * self._collective(path, "send", (0, plan.stage_size), rows * hidden) if stages > 1 else 0
        return cost.plus(StepCost({"all-reduce": gathered} | ({"pipeline": sends} if sends else {})))

    # ------------------------------------------------------------------------------------------------ exchanges

    def _exchange(self, path: str, shard: Shard, placement: ExpertPlacement, rows: int) -> StepCost:
        """What a MoE layer's ranks send each other, by the formulas of docs/parallel.md."""
        plan, hidden = self.plan, self.model.hidden_size
        stage, tp = self._group("stage", shard.rank), self._group("tp", shard.rank)
        if not plan.uses_all_to_all:
            if plan.data_parallel_size == 1:
                return self._all_reduce(path, "stage", shard, rows * hidden)
            replicas = self._group("dp", shard.rank)
            whole = rows * len(replicas) * hidden
            seconds = sum(self._collective(path, op, replicas, whole) for op in ("all_gather", "reduce_scatter"))
            return StepCost({"all-reduce": seconds}).plus(self._all_reduce(path, "tp", shard, rows * hidden))
        ep, etp = self._group("ep", shard.rank), self._group("etp", shard.rank)
        own = rows / len(tp)
        sent = self._load(placement, rows * plan.data_parallel_size).reached * own * hidden
        seconds = 2 * self._collective(path, "all_to_all", ep, sent) + self._collective(path, "all_to_all", ep, 8)
        seconds += self._collective(path, "all_gather", etp, sent * len(etp))
        seconds += self._collective(path, "reduce_scatter", etp, sent * len(etp))
        seconds += self._collective(path, "all_gather", tp, rows * hidden)
        return StepCost({"all-to-all": seconds if len(stage) > 1 else 0.0})

    def _all_reduce(self, path: str, group: str, shard: Shard, numbers: float) -> StepCost:
        ranks = self._group(group, shard.rank)
        return StepCost({"all-reduce": self._collective(path, "all_reduce", ranks, numbers)} if len(ranks) > 1 else {})

    def _collective(self, path: str, op: str, ranks: tuple[int, ...], numbers: float) -> float:
        captured = path == "fused" and self.machine.device.kind == "cuda"
        return exchange_seconds(self.machine, op, ranks, numbers * BITS[self.dtype] / 8, captured=captured)

    # ------------------------------------------------------------------------------------------------ prices

    def _price(self, path: str, term: str, *operations: Operation) -> StepCost:
        found = [self._lookup.estimate(path, operation) for operation in operations]
        beyond = frozenset([term]) if any(estimate.extrapolated for estimate in found) else frozenset()
        return StepCost({term: sum(estimate.seconds for estimate in found)}, beyond)
