"""Shard: what one rank holds of a model. Enters: plan, model, rank. Leaves: ranges of heads, widths, words and layers.

Loader, layers, memory estimate and planner read the same ranges, so none can hold what another did not load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flexmoe.config.layout import Coordinates, RankLayout
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan, join_choices
from flexmoe.errors import ConfigError


def even_share(total: int, parts: int, index: int) -> range:
    """Part `index` of 0..total-1; the first parts take the remainder."""
    base, extra = divmod(total, parts)
    start = index * base + min(index, extra)
    return range(start, start + base + (index < extra))


def block_share(total: int, parts: int, index: int) -> range:
    """Part `index` where all parts have one size but for the last ones, so that padding them makes them alike."""
    size = -(-total // parts)
    return range(min(index * size, total), min((index + 1) * size, total))


def kv_head_share(num_kv_heads: int, parts: int, index: int) -> range:
    """Key heads of part `index`. With more parts than heads, several parts hold the same one."""
    if parts <= num_kv_heads:
        return even_share(num_kv_heads, parts, index)
    head = index * num_kv_heads // parts
    return range(head, head + 1)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model. Raises nothing: `check` refuses what does not fit."""

    plan: ParallelPlan
    config: ModelConfig
    rank: int = 0

    @property
    def place(self) -> Coordinates:
        return RankLayout(self.plan).coordinates(self.rank)

    @property
    def layers(self) -> range:
        """The layers of this rank's pipeline stage."""
        return even_share(self.config.num_layers, self.plan.pipeline_parallel_size, self.place.pp)

    @property
    def heads(self) -> range:
        """Query heads."""
        return even_share(self.config.attention.num_heads, self.plan.tensor_parallel_size, self.place.tp)

    @property
    def kv_heads(self) -> range:
        return kv_head_share(self.config.attention.num_kv_heads, self.plan.tensor_parallel_size, self.place.tp)

    @property
    def kv_replicas(self) -> int:
        """How many ranks of the tensor group hold the same key heads."""
        return max(1, self.plan.tensor_parallel_size // self.config.attention.num_kv_heads)

    @property
    def vocab(self) -> range:
        """Words of the tensor rank: rows of embedding and language-model head, where the stage has them."""
        return block_share(self.config.vocab_size, self.plan.tensor_parallel_size, self.place.tp)

    @property
    def is_last_stage(self) -> bool:
        return self.place.pp == self.plan.pipeline_parallel_size - 1

    @property
    def embedding(self) -> range:
        """Rows of the embedding: on the first stage, and on the last one if the head is the same matrix."""
        needed = self.place.pp == 0 or (self.is_last_stage and self.config.tie_embeddings)
        return self.vocab if needed else range(0)

    @property
    def head(self) -> range:
        """Rows of the language-model head: on the last stage."""
        return self.vocab if self.is_last_stage else range(0)

    @property
    def final_norm(self) -> range:
        """Weights of the norm before the head: on the last stage."""
        return range(self.config.hidden_size if self.is_last_stage else 0)

    @property
    def dense_width(self) -> range:
        """Columns of dense feed-forwards."""
        return even_share(self.config.dense_width, self.plan.tensor_parallel_size, self.place.tp)

    @property
    def expert_width(self) -> range:
        """Columns of each expert that is here."""
        assert self.config.moe is not None
        return even_share(self.config.moe.expert_width, self.plan.expert_tensor_size, self.place.etp)

    @property
    def shared_width(self) -> range:
        """Columns of the shared expert: a slice like a dense layer's, or all where each rank has tokens of its own."""
        assert self.config.moe is not None
        width = self.config.moe.shared_width
        tp = self.plan.tensor_parallel_size
        return range(width) if self.plan.uses_all_to_all else even_share(width, tp, self.place.tp)

    def slots(self, layer: int) -> tuple[int, ...]:
        """The logical expert in each physical slot of a MoE layer."""
        assert self.config.moe is not None
        return self.plan.placement(self.config.moe.num_experts, layer).local_slots(self.place.ep)

    @property
    def local(self) -> ModelConfig:
        """A model of this rank's sizes: what it computes before the ranks put their results together.

        Its layers are those of the rank's stage. The number of experts stays, which the router needs whole.
        """
        config = self.config
        if self.plan.num_ranks == 1:
            return config
        attention = replace(config.attention, num_heads=len(self.heads), num_kv_heads=len(self.kv_heads))
        moe = config.moe
        if moe is not None:
            moe = replace(moe, expert_width=len(self.expert_width), shared_width=len(self.shared_width))
        width, vocab = len(self.dense_width), len(self.vocab)
        layers = tuple(config.layers[index] for index in self.layers)
        return replace(config, attention=attention, moe=moe, dense_width=width, vocab_size=vocab, layers=layers)


def check(plan: ParallelPlan, config: ModelConfig) -> None:
    """Raise ConfigError, saying what would fit, if the model cannot be spread like that."""
    _check_tensor(plan, config)
    _check_stages(plan, config)
    if config.moe is None:
        if plan.expert_parallel_size > 1:
            raise ConfigError(
                f"expert_parallel_size={plan.expert_parallel_size}, but {config.architecture or 'the model'} has no "
                "experts; use 1."
            )
        return
    _check_experts(plan, config, config.moe.num_experts)
    _divides("the width of an expert", config.moe.expert_width, plan.expert_tensor_size, "ranks that slice each expert")
    if not plan.uses_all_to_all:
        _divides("the width of the shared expert", config.moe.shared_width, plan.tensor_parallel_size, "tensor ranks")


def _check_tensor(plan: ParallelPlan, config: ModelConfig) -> None:
    a, tp = config.attention, plan.tensor_parallel_size
    has_dense = any(not layer.is_moe for layer in config.layers)

    def fits(degree: int) -> bool:
        kv_fits = a.num_kv_heads % degree == 0 or degree % a.num_kv_heads == 0
        return a.num_heads % degree == 0 and kv_fits and not (has_dense and config.dense_width % degree)

    if not fits(tp):
        dense = f" and the dense width {config.dense_width}" if has_dense else ""
        raise ConfigError(
            f"tensor_parallel_size={tp} does not fit {a.num_heads} heads with {a.num_kv_heads} key heads{dense}; "
            f"use {_fitting(a.num_heads, fits)}."
        )


def _check_stages(plan: ParallelPlan, config: ModelConfig) -> None:
    if plan.pipeline_parallel_size > config.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={plan.pipeline_parallel_size} is above the model's {config.num_layers} layers; "
            f"use at most {config.num_layers}."
        )


def _check_experts(plan: ParallelPlan, config: ModelConfig, num_experts: int) -> None:
    for layer, placement in plan.placements.items():
        where = "all layers" if layer is None else f"layer {layer}"
        if layer is not None and not (0 <= layer < config.num_layers and config.layers[layer].is_moe):
            raise ConfigError(f"the plan places experts in layer {layer}, which has none in this model; leave it out.")
        if placement.num_experts != num_experts:
            raise ConfigError(
                f"the plan's placement of {where} is for {placement.num_experts} experts; the model has {num_experts}."
            )
    moe_layers = {i for i, layer in enumerate(config.layers) if layer.is_moe}
    placed = None in plan.placements or moe_layers <= plan.placements.keys()
    if plan.expert_parallel_size > num_experts and not placed:
        raise ConfigError(
            f"expert_parallel_size={plan.expert_parallel_size} is above the model's {num_experts} experts, so that a "
            f"rank would hold none; use at most {num_experts}, or a plan whose placement has replicas."
        )


def _divides(what: str, size: int, parts: int, kind: str) -> None:
    if size % parts:
        fitting = _fitting(size, lambda degree: size % degree == 0)
        raise ConfigError(f"{what}, {size}, cannot be shared by {parts} {kind}; use {fitting} of them.")


def _fitting(limit: int, fits: Callable[[int], bool]) -> str:
    """The degrees that fit, up to 64: nobody has more ranks in a group."""
    return join_choices(degree for degree in range(1, min(limit, 64) + 1) if fits(degree))
