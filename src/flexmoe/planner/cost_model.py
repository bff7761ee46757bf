"""CostModel: what a step takes. Enters: a machine, a model, a plan, and the rows of a step. Leaves: seconds by term.

A step is a pass of decodes and a pass of prompts, as `engine/model_runner.py` makes them. Of the ranks that compute a
layer together the one with most to do counts, since the others wait for it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flexmoe.config.engine import MAX_ROWS
from flexmoe.config.layout import RankLayout
from flexmoe.config.machine import Machine
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.shard import Shard, check
from flexmoe.errors import ConfigError
from flexmoe.planner.collectives import exchange_seconds
from flexmoe.planner.lookup import Lookup
from flexmoe.planner.memory import MemoryUse, memory_use
from flexmoe.planner.operations import BITS, Operation
from flexmoe.planner.routing import Load, Routing, expert_loads
from flexmoe.scheduling.prompt_forms import graph_form, graphed_by

TERMS = (
    "attention projections", "attention", "router", "experts", "dense", "head", "all-reduce", "all-to-all",
    "host", "pipeline",
)  # fmt: skip
_FUSED_ROWS = {"cuda": MAX_ROWS, "cpu": 64}  # of decodes that the fused kernels take
_WORTH_TORCH = {"float32": 400e6, "bfloat16": 200e6}  # multiply-adds a layer, see models/native.py
_LEAST_ROWS = 4
_QUERY_BLOCK = 128  # rows that attention of prompts takes at once
_MOST_ONE_SHOT = 16 << 20  # bytes that a rank reads of the others in one launch, see models/fused_ranks.py


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


_Kind = tuple[bool, ExpertPlacement | None]  # of a layer: whether it has experts, and where


@dataclass(frozen=True, slots=True)
class _Stage:
    """The first rank of a pipeline stage, and the layers there: how many of each kind, and with which window.

    config: with the rank's sizes. last, last_window: the kind of its last layer, and its window. groups: by name, the
    ranks of each group that the rank is in.
    """

    config: ModelConfig
    vocabulary: int
    kinds: Mapping[_Kind, int]
    last: _Kind
    windows: Mapping[int | None, int]
    last_window: int | None
    groups: Mapping[str, tuple[int, ...]]


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
        one_pass: bool = False,
    ) -> None:
        """dtype: of all that is not quantized. routing: how rows choose experts; None: all are as likely. one_pass:
        decodes beside prompts go through the prompts' pass.
        """
        check(plan, model)
        if plan.num_ranks > machine.num_devices and not machine.is_shared:
            raise ConfigError(
                f"the plan has {plan.num_ranks} ranks, but the machine {machine.name} has {machine.num_devices} "
                "devices; use a smaller plan or a larger machine."
            )
        self.machine, self.model, self.plan, self.dtype = machine, model, plan, dtype
        self.quantization, self._one_pass = quantization, one_pass
        per_node = min(plan.num_ranks, machine.devices_per_node) if machine.nodes > 1 else plan.num_ranks
        self._lookup = Lookup(machine, dtype, quantization, per_node if machine.is_shared else 1)
        self._stages = [
            _stage(Shard(plan, model, place * plan.stage_size)) for place in range(plan.pipeline_parallel_size)
        ]
        self._routing = routing or Routing()
        self._fixed = functools.lru_cache(maxsize=4096)(self._without_attention)

    def step(self, shape: StepShape) -> StepCost:
        """Of the whole step, until its tokens are known."""
        device = self.machine.device
        cost = StepCost({"host": device.host_s + device.host_row_s * (shape.decodes + len(shape.chunks))})
        for each in self._passes(shape):
            computed = self._fixed(each.path, each.rows, each.sampled).plus(self._attention(each))
            cost = cost.plus(computed)
            cost = cost.plus(StepCost({"host": max(0.0, self._launching(each) - computed.seconds)}))
        return cost

    def memory(self, max_tokens: int, step_tokens: int = 2048) -> MemoryUse:
        """With so many tokens in the KV cache of each data rank, and so many computed together."""
        return memory_use(
            self.machine, self.model, self.plan, self.dtype, self.quantization, max_tokens, step_tokens
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ passes

    def _passes(self, shape: StepShape) -> list[_Pass]:
        """Decodes that have a path of their own, and the rest. Beside prompts one pass of data ranks, or if asked."""
        context, decodes = _rounded(shape.context), shape.decodes
        chunks = tuple(Chunk(_rounded(c.tokens), _rounded(c.cached) if c.cached else 0) for c in shape.chunks)
        together = bool(chunks) and (self._one_pass or self.plan.data_parallel_size > 1)
        fused = 0 < decodes <= self._most_fused() and not together
        found = [_Pass("fused", decodes, decodes, decodes, context, ())] if fused else []
        rest = 0 if fused else decodes
        rows = rest + sum(chunk.tokens for chunk in shape.chunks)
        if rows:
            staged = self.plan.pipeline_parallel_size > 1
            path = "prompts" if self.machine.device.kind == "cuda" and not staged else "torch"
            found.append(_Pass(path, _rounded(rows), rest + len(chunks), rest, context, chunks))
        return found

    def _most_fused(self) -> int:
        """Decodes up to which the fused kernels take them; 0 where they are not used at all."""
        plan, most = self.plan, _FUSED_ROWS[self.machine.device.kind]
        if self.machine.device.kind == "cuda":
            return 0 if plan.uses_all_to_all or plan.pipeline_parallel_size > 1 else most
        if plan.num_ranks > 1 or self.dtype not in _WORTH_TORCH:
            return 0
        if self.quantization is not None:
            return most
        model = self.model
        weights = model.num_active_parameters() - model.vocab_size * model.hidden_size
        return int(min(max(_WORTH_TORCH[self.dtype] / (weights / model.num_layers), _LEAST_ROWS), most))

    def _launching(self, each: _Pass) -> float:
        """Seconds in which the host launches the pass while the GPU computes; 0 of a graph, and on a CPU."""
        device, parts = self.machine.device, len(each.chunks) + each.decodes
        graphed = graph_form(each.rows, parts, graphed_by(self.plan)) is not None
        if self.machine.is_shared or each.path == "fused" or (each.path == "prompts" and graphed):
            return 0.0
        if each.path == "torch":
            return self.model.num_layers * (device.torch_layer_s + device.torch_chunk_s * max(0, parts - 1))
        # Where tokens travel, the MoE block is torch's: nearly all of a layer's launches.
        return self.model.num_layers * (device.torch_layer_s if self.plan.moves_tokens else device.prompt_layer_s)

    # ------------------------------------------------------------------------------------------------ terms

    def _without_attention(self, path: str, rows: int, sampled: int) -> StepCost:
        """All that does not depend on contexts, on all stages."""
        cost, cuts = StepCost(), self._cuts(path)
        for stage in self._stages:
            for kind, count in stage.kinds.items():
                whole = count - 1 if cuts and kind == stage.last else count
                cost = cost.plus_scaled(self._projected(path, rows, stage.config.qkv_size), whole)
                cost = cost.plus_scaled(self._behind_attention(path, stage, kind, rows), whole)
            if cuts:
                a = stage.config.attention
                queries = a.num_heads * a.head_dim
                cost = cost.plus(self._projected(path, rows, stage.config.qkv_size - queries))
                if sampled:
                    cost = cost.plus(self._projected(path, sampled, queries))
                    cost = cost.plus(self._behind_attention(path, stage, stage.last, sampled))
        return cost.plus(self._ends(path, rows, sampled))

    def _cuts(self, path: str) -> bool:
        """Whether the last layer, but for keys and values, is computed of sampled rows alone."""
        return path == "prompts" and not self.plan.moves_tokens

    def _projected(self, path: str, rows: int, size: int) -> StepCost:
        """Queries, keys and values, or some of them: so many numbers a row."""
        return self._price(path, "attention projections", Operation("linear", rows, (size, self.model.hidden_size)))

    def _behind_attention(self, path: str, stage: _Stage, kind: _Kind, rows: int) -> StepCost:
        """Its output, summed over its ranks, and the feed-forward."""
        is_moe, placement = kind
        a, hidden = stage.config.attention, self.model.hidden_size
        output = Operation("linear", rows, (hidden, a.num_heads * a.head_dim))
        cost = self._price(path, "attention projections", output)
        cost = cost.plus(self._all_reduce(path, stage.groups["tp"], rows * hidden))
        return cost.plus(
            self._moe_layer(path, stage, placement, rows) if is_moe else self._dense_layer(path, stage, rows)
        )

    def _dense_layer(self, path: str, stage: _Stage, rows: int) -> StepCost:
        """A feed-forward without experts, and the sum over its ranks."""
        cost = self._feed_forward(path, stage.config.dense_width, rows)
        return cost.plus(self._all_reduce(path, stage.groups["tp"], rows * self.model.hidden_size))

    def _moe_layer(self, path: str, stage: _Stage, placement: ExpertPlacement | None, rows: int) -> StepCost:
        """Router, experts, what ranks exchange; and the expert that every token takes."""
        moe, hidden = stage.config.moe, self.model.hidden_size
        assert moe is not None
        assert placement is not None
        of_all = rows * self.plan.data_parallel_size
        load, routed = self._load(placement, of_all), of_all if path == "fused" else rows  # gathered, then routed
        cost = self._price(path, "router", Operation("router", routed, (moe.num_experts, hidden, moe.top_k)))
        if load.active:
            experts = Operation("experts", load.pairs, (load.active, hidden, moe.expert_width))
            cost = cost.plus(self._price(path, "experts", experts))
        if moe.shared_width:
            cost = cost.plus(self._feed_forward(path, moe.shared_width, rows))
        return cost.plus(self._exchange(path, stage, load, rows))

    def _load(self, placement: ExpertPlacement, rows: int) -> Load:
        assert self.model.moe is not None
        return expert_loads(self.model.moe, placement, self._routing).load(rows)

    def _feed_forward(self, path: str, width: int, rows: int) -> StepCost:
        hidden = self.model.hidden_size
        up, down = Operation("linear", rows, (2 * width, hidden)), Operation("linear", rows, (hidden, width))
        return self._price(path, "dense", up, down)

    def _attention(self, each: _Pass) -> StepCost:
        """Of all layers, on all stages."""
        cost = StepCost()
        for stage in self._stages:
            a = stage.config.attention
            sizes = a.num_heads, a.num_kv_heads, a.head_dim, a.normed_heads
            for window, count in stage.windows.items():
                seen = each.context if window is None else min(each.context, window)
                decodes = [Operation("attention", each.decodes, (seen, *sizes))] if each.decodes else []
                chunks = [Operation("prompt", c.tokens, (c.cached, *sizes)) for c in each.chunks]
                cut = self._cuts(each.path) and window == stage.last_window
                cost = cost.plus_scaled(self._price(each.path, "attention", *decodes, *chunks), count - cut)
                if cut:  # the block of queries at each chunk's end
                    tails = [min(c.tokens, _QUERY_BLOCK) for c in each.chunks]
                    chunks = [
                        Operation("prompt", tail, (c.cached + c.tokens - tail, *sizes))
                        for tail, c in zip(tails, each.chunks, strict=True)
                    ]
                    cost = cost.plus(self._price(each.path, "attention", *decodes, *chunks))
        return cost

    def _ends(self, path: str, rows: int, sampled: int) -> StepCost:
        """Embedding, head, the logits' way to whom samples, and from stage to stage."""
        plan, hidden, last = self.plan, self.model.hidden_size, self._stages[-1]
        cost = (
            self._price(path, "head", Operation("head", sampled, (last.vocabulary, hidden))) if sampled else StepCost()
        )
        cost = cost.plus(self._all_reduce(path, self._stages[0].groups["tp"], rows * hidden))
        group = last.groups["tp"]
        numbers = 8 * rows / (BITS[self.dtype] / 8) if path == "fused" else sampled * last.vocabulary
        if len(group) > 1:
            gathered = self._collective(path, "all_gather", group, numbers * len(group))
            cost = cost.plus(StepCost({"all-reduce": gathered}))
        if plan.pipeline_parallel_size > 1:
            sent = self._collective(path, "send", (0, plan.stage_size), rows * hidden)
            cost = cost.plus(StepCost({"pipeline": (plan.pipeline_parallel_size - 1) * sent}))
        return cost

    # ------------------------------------------------------------------------------------------------ exchanges

    def _exchange(self, path: str, stage: _Stage, load: Load, rows: int) -> StepCost:
        """What a MoE layer's ranks send each other, by the formulas of docs/parallel.md."""
        plan, hidden, groups = self.plan, self.model.hidden_size, stage.groups
        if not plan.uses_all_to_all:
            if plan.data_parallel_size == 1:
                return self._all_reduce(path, groups["stage"], rows * hidden)
            return self._gather(path, groups, rows * hidden).plus(self._all_reduce(path, groups["tp"], rows * hidden))
        assert self.model.moe is not None
        copies, slices = load.reached * rows / plan.tensor_parallel_size, plan.expert_tensor_size
        routing = 2 * self.model.moe.top_k  # slots and weights of a row
        exchanges = [
            ("all_to_all", "ep", 8 * len(groups["ep"])),  # how many rows come
            ("all_to_all", "ep", copies * hidden), ("all_to_all", "ep", copies * routing),
            ("all_gather", "etp", 8 * slices),
            ("all_gather", "etp", copies * hidden * slices), ("all_gather", "etp", copies * routing * slices),
            ("reduce_scatter", "etp", copies * hidden * slices), ("all_to_all", "ep", copies * hidden),
        ]  # fmt: skip
        seconds = sum(self._collective(path, op, groups[group], numbers) for op, group, numbers in exchanges)
        return StepCost({"all-to-all": seconds + self._collective(path, "all_gather", groups["tp"], rows * hidden)})

    def _gather(self, path: str, groups: Mapping[str, tuple[int, ...]], numbers: float) -> StepCost:
        """Rows of every data rank to all of them, and the sums of its own back. numbers: of one data rank's rows."""
        ranks = groups["dp"]
        if len(groups["tp"]) == 1 and self._in_one_launch(path, ranks, numbers):
            return StepCost({"all-reduce": 2 * self._collective(path, "one_shot", ranks, numbers)})
        whole = numbers * len(ranks)
        seconds = sum(self._collective(path, op, ranks, whole) for op in ("all_gather", "reduce_scatter"))
        return StepCost({"all-reduce": seconds})

    def _all_reduce(self, path: str, ranks: tuple[int, ...], numbers: float) -> StepCost:
        if len(ranks) == 1:
            return StepCost()
        one_launch = self._in_one_launch(path, ranks, numbers)
        seconds = self._collective(path, "one_shot" if one_launch else "all_reduce", ranks, numbers)
        return StepCost({"all-reduce": seconds})

    def _in_one_launch(self, path: str, ranks: tuple[int, ...], numbers: float) -> bool:
        """Whether ranks read each other's memory for so many numbers of each."""
        sent = (len(ranks) - 1) * numbers * BITS[self.dtype] / 8
        apart = {rank // self.machine.devices_per_node for rank in ranks}
        return path == "fused" and len(apart) == 1 and sent <= _MOST_ONE_SHOT

    def _collective(self, path: str, op: str, ranks: tuple[int, ...], numbers: float) -> float:
        captured = path == "fused" and self.machine.device.kind == "cuda"
        if self.machine.device.kind == "cpu" and op != "send" and len(ranks) > 1:
            ranks = tuple(range(self.plan.num_ranks))  # groups exchange at the same time, on the same cores
        return exchange_seconds(self.machine, op, ranks, numbers * BITS[self.dtype] / 8, captured=captured)

    # ------------------------------------------------------------------------------------------------ prices

    def _price(self, path: str, term: str, *operations: Operation) -> StepCost:
        found = [self._lookup.estimate(path, operation) for operation in operations]
        beyond = frozenset([term]) if any(estimate.extrapolated for estimate in found) else frozenset()
        return StepCost({term: sum(estimate.seconds for estimate in found)}, beyond)


def _stage(shard: Shard) -> _Stage:
    plan, model, moe = shard.plan, shard.config, shard.config.moe
    kinds: list[_Kind] = []
    for index in shard.layers:
        is_moe = model.layers[index].is_moe and moe is not None
        kinds.append((is_moe, plan.placement(moe.num_experts, index) if is_moe and moe is not None else None))
    layout = RankLayout(plan)
    return _Stage(
        config=shard.local,
        vocabulary=len(shard.vocab),
        kinds=Counter(kinds),
        last=kinds[-1],
        windows=Counter(model.layers[index].window for index in shard.layers),
        last_window=model.layers[shard.layers[-1]].window,
        groups={name: layout.group(name, shard.rank) for name in ("stage", "dp", "tp", "ep", "etp")},
    )


def _rounded(number: float) -> int:
    """To six binary digits: numbers that near cost the same, and are looked up once."""
    whole = max(1, round(number))
    step = 1 << max(0, whole.bit_length() - 6)
    return (whole + step // 2) // step * step
