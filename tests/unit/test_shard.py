"""RankLayout and Shard: every rank is in one group of each kind, and the ranks' shares make up the model, once each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.config.layout import GROUPS, RankLayout
from flexmoe.config.model import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RopeConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.shard import Shard, block_share, check, even_share, kv_head_share
from flexmoe.errors import ConfigError
from tests.unit.test_plan_json import plans

CONFIG = ModelConfig(
    family="tiny", architecture="Tiny", vocab_size=50, hidden_size=64, dense_width=48,
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=16, rope=RopeConfig(theta=1e4, rotary_dim=16)),
    moe=MoEConfig(num_experts=6, top_k=2, expert_width=24, renormalize=True, shared_width=40, shared_gate=True),
    layers=(LayerConfig(is_moe=True), LayerConfig(is_moe=False), LayerConfig(is_moe=True)), norm_eps=1e-5,
    max_position=4096, tie_embeddings=False,
)  # fmt: skip


@given(plans())
def test_groups_share_out_the_ranks(plan: ParallelPlan) -> None:
    layout = RankLayout(plan)
    sizes = {
        "world": plan.num_ranks, "stage": plan.stage_size, "pp": plan.pipeline_parallel_size,
        "dp": plan.data_parallel_size, "tp": plan.tensor_parallel_size, "ep": plan.expert_parallel_size,
        "etp": plan.expert_tensor_size,
    }  # fmt: skip
    for name in GROUPS:
        groups = layout.groups(name)
        assert sorted(rank for group in groups for rank in group) == list(range(plan.num_ranks))
        assert {len(group) for group in groups} == {sizes[name]}
        for group in groups:  # a rank's coordinate is its index in its group
            assert [getattr(layout.coordinates(rank), name) for rank in group] == list(range(len(group)))
            assert all(layout.group(name, rank) == group for rank in group)


def test_groups_by_hand() -> None:
    layout = RankLayout(ParallelPlan(2, 2, 2, 2))  # 8 ranks: 2 stages of 2 replicas of 2 slices; ep 2 x etp 2
    assert layout.groups("tp") == layout.groups("etp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.groups("dp") == layout.groups("ep") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert layout.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert layout.groups("stage") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert layout.describe(6) == "pp 1, dp 1, tp 0, ep 1, etp 0"
    assert RankLayout(ParallelPlan()).describe(0) == ""


@given(total=st.integers(0, 99), parts=st.integers(1, 20))
def test_shares_are_the_whole_in_order(total: int, parts: int) -> None:
    for share in (even_share, block_share):
        assert [i for part in range(parts) for i in share(total, parts, part)] == list(range(total))
    even = [len(even_share(total, parts, part)) for part in range(parts)]
    assert max(even) - min(even) <= 1
    size = -(-total // parts)
    assert all(block_share(total, parts, part).start == min(part * size, total) for part in range(parts))


@given(heads=st.sampled_from([1, 2, 4, 8]), parts=st.sampled_from([1, 2, 4, 8, 16]), groups=st.sampled_from([1, 2, 4]))
def test_every_query_head_meets_its_key_head(heads: int, parts: int, groups: int) -> None:
    queries = heads * groups
    if queries % parts:
        return
    held = Counter()
    for part in range(parts):
        own, kv = even_share(queries, parts, part), kv_head_share(heads, parts, part)
        held.update(kv)
        per_kv = len(own) // len(kv)
        assert all(q // groups == kv[i // per_kv] for i, q in enumerate(own))
    assert set(held) == set(range(heads))
    assert set(held.values()) == {max(1, parts // heads)}


def test_one_rank_holds_the_model() -> None:
    assert Shard(ParallelPlan(), CONFIG).local == CONFIG


def test_a_hybrid_shard_by_hand() -> None:
    plan = ParallelPlan(4, 2, placements={2: ExpertPlacement(6, ((0, 1, 2, 3), (4, 5, 0)))})
    shard = Shard(plan, CONFIG, rank=3)
    assert (shard.place.tp, shard.place.ep, shard.place.etp) == (3, 1, 1)
    assert (shard.heads, shard.kv_heads, shard.kv_replicas) == (range(6, 8), range(1, 2), 2)
    assert (shard.vocab, shard.dense_width, shard.shared_width) == (range(39, 50), range(36, 48), range(30, 40))
    assert shard.expert_width == range(12, 24)
    assert (shard.slots(0), shard.slots(2)) == ((3, 4, 5), (4, 5, 0))
    local = shard.local
    assert (local.attention.num_heads, local.attention.num_kv_heads, local.vocab_size) == (2, 1, 11)
    assert local.moe == replace(CONFIG.moe, expert_width=12, shared_width=10)  # type: ignore[type-var]
    assert len(Shard(replace(plan, moe_dispatch="all_to_all"), CONFIG, 3).shared_width) == 40


def test_a_stage_of_data_ranks_by_hand() -> None:
    """3 layers on 2 stages; 2 data ranks of 2 tensor ranks, whose 4 share the experts as 2 x 2."""
    plan = ParallelPlan(2, 2, pipeline_parallel_size=2, data_parallel_size=2)
    first, last = Shard(plan, CONFIG, rank=1), Shard(plan, CONFIG, rank=6)
    assert (last.place.pp, last.place.dp, last.place.tp, last.place.ep, last.place.etp) == (1, 1, 0, 1, 0)
    assert (first.layers, last.layers) == (range(2), range(2, 3))
    assert (first.embedding, first.head, len(first.final_norm)) == (range(25, 50), range(0), 0)
    assert (last.embedding, last.head, len(last.final_norm)) == (range(0), range(25), 64)
    assert Shard(plan, replace(CONFIG, tie_embeddings=True), rank=6).embedding == range(25)
    assert (last.expert_width, last.shared_width, last.slots(2)) == (range(12), range(20), (3, 4, 5))
    assert first.local.layers == CONFIG.layers[:2]
    assert RankLayout(plan).samplers == (4, 6)
    assert RankLayout(plan).group("pp", 2) == (2, 6)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (ParallelPlan(3), "tensor_parallel_size=3 does not fit 8 heads with 2 key heads and the dense width 48; "
                          "use 1, 2, 4 or 8."),
        (ParallelPlan(4, pipeline_parallel_size=4), "above the model's 3 layers; use at most 3."),
        (ParallelPlan(data_parallel_size=5), "the width of an expert, 24, cannot be shared by 5 ranks that slice each "
                                             "expert; use 1, 2, 3, 4, 6, 8, 12 or 24 of them."),
        (ParallelPlan(8, 8), "expert_parallel_size=8 is above the model's 6 experts, so that a rank would hold none; "
                             "use at most 6, or a plan whose placement has replicas."),
        (ParallelPlan(placements={1: ExpertPlacement.contiguous(6)}), "places experts in layer 1, which has none"),
        (ParallelPlan(placements={None: ExpertPlacement.contiguous(4)}), "of all layers is for 4 experts; "
                                                                         "the model has 6."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(plan: ParallelPlan, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(plan, CONFIG)
    assert words in str(error.value)


def test_widths_must_be_shared_evenly() -> None:
    moe = replace(CONFIG.moe, expert_width=27)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"the width of an expert, 27, cannot be shared by 2 ranks .* use 1, 3, 9"):
        check(ParallelPlan(2), replace(CONFIG, moe=moe))
    moe = replace(CONFIG.moe, shared_width=9)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="the width of the shared expert, 9, cannot be shared by 2"):
        check(ParallelPlan(2), replace(CONFIG, moe=moe))
    check(ParallelPlan(2, moe_dispatch="all_to_all"), replace(CONFIG, moe=moe))


def test_more_ranks_than_experts_need_replicas() -> None:
    slots = ((0, 1), (2,), (3,), (4,), (5,), (0,), (1,), (2,))
    check(ParallelPlan(8, 8, placements={None: ExpertPlacement(6, slots)}), CONFIG)


def test_a_model_without_experts() -> None:
    dense = replace(CONFIG, moe=None, layers=(LayerConfig(is_moe=False),))
    check(ParallelPlan(2), dense)
    with pytest.raises(ConfigError, match="expert_parallel_size=2, but Tiny has no experts; use 1"):
        check(ParallelPlan(2, 2), dense)
