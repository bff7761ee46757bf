"""The cost model: which terms a plan has, how they move with rows and ranks, routing by count, and memory's bound."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from flexmoe.config.machine import Machine
from flexmoe.config.model import MoEConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.routing import LayerLoad
from flexmoe.errors import ConfigError
from flexmoe.models.presets import PRESETS
from flexmoe.planner.cost_model import Chunk, CostModel, StepCost, StepShape
from flexmoe.planner.routing import ExpertLoads, Routing

H200 = Machine.load("h200x8")
OLMOE, MIXTRAL, QWEN = (PRESETS[name].config for name in ("olmoe-1b-7b", "mixtral-8x7b", "qwen3-30b-a3b"))
DECODES = StepShape(8, 500)


def step(plan: ParallelPlan, shape: StepShape = DECODES, machine: Machine = H200) -> StepCost:
    return CostModel(machine, OLMOE, plan).step(shape)


def test_terms_of_one_gpu() -> None:
    cost = step(ParallelPlan())
    assert set(cost.terms) == {"attention projections", "attention", "router", "experts", "head", "host"}
    assert cost.seconds == pytest.approx(sum(cost.terms.values()))
    assert 0 < cost.terms["router"] < cost.terms["experts"]


@pytest.mark.parametrize(
    ("plan", "term"),
    [
        (ParallelPlan(4), "all-reduce"),
        (ParallelPlan(4, 4), "all-reduce"),
        (ParallelPlan(4, 4, moe_dispatch="all_to_all"), "all-to-all"),
        (ParallelPlan(2, 2, 2), "pipeline"),
        (ParallelPlan(1, 4, 1, 4), "all-reduce"),
    ],
)
def test_ranks_exchange_and_compute_less(plan: ParallelPlan, term: str) -> None:
    alone, together = step(ParallelPlan()), step(plan)
    assert together.terms[term] > 0
    assert together.terms["experts"] < alone.terms["experts"]


def test_more_rows_and_longer_contexts_take_longer() -> None:
    for smaller, larger in (
        (StepShape(8, 500), StepShape(64, 500)),
        (StepShape(8, 500), StepShape(8, 4000)),
        (StepShape(8, 500), StepShape(8, 500, (Chunk(512),))),
        (StepShape(chunks=(Chunk(8192),)), StepShape(chunks=(Chunk(8192, cached=8192),))),
        (StepShape(chunks=(Chunk(8192),)), StepShape(chunks=(Chunk(8192), Chunk(512)))),
    ):
        assert step(ParallelPlan(), smaller).seconds < step(ParallelPlan(), larger).seconds
    assert step(ParallelPlan(), StepShape()).seconds == H200.device.host_s


def test_contexts_of_each_row_count_by_their_mean() -> None:
    assert StepShape.of([100, 300], [Chunk(7)]) == StepShape(2, 200.0, (Chunk(7),))
    assert StepShape.of([100, 300], [Chunk(7)]).tokens == 9


def test_a_gpu_waits_for_the_host_where_steps_are_no_graph() -> None:
    slow = replace(H200, device=replace(H200.device, prompt_layer_s=5e-3, torch_layer_s=8e-3, torch_chunk_s=1e-3))
    prompts = StepShape(chunks=(Chunk(16),) * 3)
    host = slow.device.host_s + 3 * slow.device.host_row_s
    long = StepShape(chunks=(Chunk(2300),))
    longer = StepShape(chunks=(Chunk(9000),))
    slower = replace(slow, device=replace(slow.device, prompt_layer_s=0.1))
    assert step(ParallelPlan(4), longer, slower).seconds == pytest.approx(16 * 0.1 + slow.device.host_s, rel=0.01)
    travelling = ParallelPlan(4, 4, moe_dispatch="all_to_all")
    assert step(travelling, prompts, slow).seconds == pytest.approx(16 * 8e-3 + host)
    staged = ParallelPlan(pipeline_parallel_size=4)
    assert step(staged, prompts, slow).seconds == pytest.approx(16 * (8e-3 + 2 * 1e-3) + host, rel=0.02)
    for captured in (DECODES, prompts, StepShape(chunks=(Chunk(2048),))):
        for plan in (ParallelPlan(), ParallelPlan(4)):
            assert step(plan, captured, slow).terms["host"] < 1e-3
    assert step(ParallelPlan(4), long, slow).terms["host"] < 1e-3
    for alone in (long, StepShape(chunks=(Chunk(1),) * 65)):
        assert step(ParallelPlan(), alone, slow).seconds > 16 * 5e-3


def test_decodes_of_data_ranks_are_graphs_and_one_pass_with_prompts() -> None:
    slow = replace(H200, device=replace(H200.device, prompt_layer_s=5e-3, torch_layer_s=8e-3, torch_chunk_s=1e-3))
    data = ParallelPlan(data_parallel_size=4, expert_parallel_size=4)
    assert step(data, DECODES, slow).terms["host"] < 1e-3
    host = slow.device.host_s + 9 * slow.device.host_row_s
    mixed = StepShape(8, 500, (Chunk(16),))
    assert step(data, mixed, slow).seconds == pytest.approx(16 * 8e-3 + host)
    to_all = replace(data, moe_dispatch="all_to_all")
    assert step(to_all, DECODES, slow).seconds == pytest.approx(16 * 8e-3 + host - slow.device.host_row_s)
    rows = [step(data, StepShape(rows, 500)).terms["all-reduce"] for rows in (8, 512)]  # one launch, and NCCL's
    assert 0 < rows[0] < rows[1]


def test_in_one_pass_decodes_beside_prompts_read_no_weights_of_their_own() -> None:
    two, one = (CostModel(H200, MIXTRAL, ParallelPlan(), one_pass=one_pass) for one_pass in (False, True))
    mixed, prompts = StepShape(32, 500, (Chunk(512),)), StepShape(chunks=(Chunk(512),))
    decodes = StepShape(32, 500)
    assert two.step(mixed).seconds == pytest.approx(two.step(prompts).seconds + two.step(decodes).seconds, rel=0.01)
    assert one.step(mixed).seconds < 1.1 * two.step(prompts).seconds
    for shape in (prompts, decodes):
        assert one.step(shape) == two.step(shape)


def test_experts_wait_for_the_rank_that_reads_most() -> None:
    moe = MoEConfig(64, 8, 1024, renormalize=False)
    load = ExpertLoads(moe, ExpertPlacement.contiguous(64, 8), Routing()).load(4)
    mean = moe.expected_experts(4) / 8
    assert mean * 1.2 < load.active < 8, "more than the mean of the ranks"
    assert load.pairs >= load.active
    many = ExpertLoads(moe, ExpertPlacement.contiguous(64, 8), Routing()).load(4096)
    assert many.active == pytest.approx(8)
    assert 4096 <= many.pairs < 1.2 * 4096


def test_rows_reach_as_many_ranks_as_the_formula_says() -> None:
    """P (1 - C(E - E/P, K) / C(E, K)) of P ranks, if all experts are as likely."""
    moe = MoEConfig(128, 8, 768, renormalize=True)
    for ranks, expected in ((4, 3.63), (8, 5.34), (16, 6.60)):
        apart = math.comb(128 - 128 // ranks, 8) / math.comb(128, 8)
        assert ranks * (1 - apart) == pytest.approx(expected, abs=0.01)
        found = ExpertLoads(moe, ExpertPlacement.contiguous(128, ranks), Routing()).load(512).reached
        assert found == pytest.approx(expected, rel=0.03)


def test_skewed_routing_reads_fewer_experts_and_loads_one_rank() -> None:
    moe = MoEConfig(64, 8, 1024, renormalize=False)
    even, skewed = Routing(), Routing.power_law(64, 1.2)
    one, eight = ExpertPlacement.contiguous(64, 1), ExpertPlacement.contiguous(64, 8)
    assert ExpertLoads(moe, one, skewed).load(16).active < ExpertLoads(moe, one, even).load(16).active
    assert ExpertLoads(moe, eight, skewed).load(1024).pairs > 1.2 * ExpertLoads(moe, eight, even).load(1024).pairs


def test_recordings_and_replicas() -> None:
    moe = MoEConfig(4, 1, 64, renormalize=True)
    hot = Routing.recorded([LayerLoad("m", 0, 1, (97, 1, 1, 1), 10, 100, (10, 1, 1, 1))])
    apart = ExpertLoads(moe, ExpertPlacement(4, ((0, 1), (2, 3))), hot).load(256)
    shared = ExpertLoads(moe, ExpertPlacement(4, ((0, 1, 2), (0, 3))), hot).load(256)
    assert apart.pairs > 0.9 * 256
    assert shared.pairs < 0.6 * 256
    with pytest.raises(ConfigError, match="layers with 4 experts, the model has 64"):
        CostModel(H200, OLMOE, ParallelPlan(), routing=hot).step(DECODES)


def test_the_same_question_has_the_same_answer() -> None:
    plan = ParallelPlan(4, 4)
    assert step(plan) == step(plan)


def test_memory_by_hand() -> None:
    use = CostModel(H200, OLMOE, ParallelPlan()).memory(100_000)
    assert use.weights == 2 * OLMOE.num_parameters()
    assert use.kv_per_token == 16 * 2 * 16 * 128 * 2
    assert use.kv == 100_000 * use.kv_per_token
    assert use.fits
    assert use.reason == ""
    assert use.total + (use.kv_tokens - 100_000) * use.kv_per_token <= use.capacity
    assert not CostModel(H200, OLMOE, ParallelPlan()).memory(use.kv_tokens + 1).fits


def test_what_does_not_fit_says_why() -> None:
    small = Machine.load("l4x4-pcie")
    use = CostModel(small, MIXTRAL, ParallelPlan()).memory(1000)
    assert not use.fits
    assert use.kv_tokens == 0
    assert "needs" in use.reason
    assert "weights in bfloat16 86.9" in use.reason
    assert "its device has 22.00 GiB" in use.reason
    assert CostModel(small, MIXTRAL, ParallelPlan(4)).memory(1000).weights < use.weights / 3.9


def test_replicas_take_memory() -> None:
    plain = ParallelPlan(2, 2)
    spare = ExpertPlacement(64, (tuple(range(33)), tuple(range(32, 64))))
    more = replace(plain, placements={None: spare})
    weights = [CostModel(H200, OLMOE, plan).memory(1).weights for plan in (plain, more)]
    assert weights[1] - weights[0] == 16 * 3 * 2048 * 1024 * 2


def test_quantized_weights_take_less_memory_and_time() -> None:
    cpu = Machine.load("cpu2")
    full, few = (CostModel(cpu, OLMOE, ParallelPlan(), quantization=q) for q in (None, "int4"))
    assert few.memory(1).weights < 0.3 * full.memory(1).weights
    assert few.step(StepShape(1, 10)).seconds < 0.6 * full.step(StepShape(1, 10)).seconds


@pytest.mark.parametrize(
    ("machine", "plan", "words"),
    [("h200x1", ParallelPlan(2), "2 ranks, but the machine h200x1 has 1"), ("h200x8", ParallelPlan(3), "does not fit")],
)
def test_plans_that_cannot_be(machine: str, plan: ParallelPlan, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CostModel(Machine.load(machine), QWEN, plan)
