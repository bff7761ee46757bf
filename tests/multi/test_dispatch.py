"""Every dispatcher, on 2 and 4 ranks, against a loop over tokens and their experts; and the bytes that each sends.

H hidden size, F expert width, E experts, K a token, P ranks; shared expert and its gate included.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.config.model import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RopeConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.shard import Shard
from flexmoe.moe.block import MoEBlock
from flexmoe.moe.experts import reference
from tests.multi.pool import Pool
from tests.multi.worker import CPU, PoolWorker

H, WIDTH, E, K, SHARED = 8, 12, 6, 2, 16
CONFIG = ModelConfig(
    family="tiny", architecture="Tiny", vocab_size=50, hidden_size=H, dense_width=0,
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=2, rope=RopeConfig(theta=1e4, rotary_dim=2)),
    moe=MoEConfig(num_experts=E, top_k=K, expert_width=WIDTH, renormalize=True, shared_width=SHARED, shared_gate=True),
    layers=(LayerConfig(is_moe=True),), norm_eps=1e-5, max_position=64, tie_embeddings=False,
)  # fmt: skip
PLACEMENTS = {
    2: {
        "even": None,
        "uneven": ((4,), (0, 1, 5, 3, 2)),
        "empty": ((), tuple(range(E))),
        "replicas": ((0, 1, 2, 3, 0), (0, 5, 4, 3)),
        "twice on one rank": ((0, 1, 2, 0), (5, 4, 3, 5, 5)),
    },
    4: {
        "even": None,
        "uneven": ((), (0, 1, 2), (5,), (4, 3)),
        "replicas": ((0, 1), (2, 0, 3, 0), (4, 5), (0, 3)),
        "everywhere": (tuple(range(E)),) * 4,
    },
}
PLANS = {
    "tensor": (lambda size: (size, 1), "all_reduce"),
    "expert": (lambda size: (size, size), "all_reduce"),
    "hybrid": (lambda size: (size, size // 2), "all_reduce"),
    "tensor, rows": (lambda size: (size, 1), "all_to_all"),
    "expert, rows": (lambda size: (size, size), "all_to_all"),
    "hybrid, rows": (lambda size: (size, size // 2), "all_to_all"),
}
ROUTINGS = ("random", "one expert", "one rank")


class Forced(nn.Module):
    """A router that says what it was told."""

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.ids, self.weights = ids, weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ids, self.weights


def weights() -> dict[str, Tensor]:
    """Of the whole layer, the same wherever they are made."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"gate": (E, WIDTH, H), "up": (E, WIDTH, H), "down": (E, H, WIDTH), "shared_gate": (SHARED, H)}
    shapes |= {"shared_up": (SHARED, H), "shared_down": (H, SHARED), "scale": (1, H)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layers(worker: PoolWorker, plan: ParallelPlan, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [layer(worker, plan, **case) for case in cases]


def layer(
    worker: PoolWorker, plan: ParallelPlan, x: Tensor, ids: Tensor, topk_weights: Tensor, rows: tuple[int, ...] = ()
) -> dict[str, Any]:
    """This rank's part of the layer: the result, the bytes it sent, the rows that went into its products.

    rows: of x, of each data rank, if there are several.
    """
    mesh = worker.mesh_of(plan)
    if rows:
        x, ids, topk_weights = (t.split(rows)[mesh.place.dp] for t in (x, ids, topk_weights))
    local = mesh.shard(CONFIG).local
    placement = plan.placement(E, 0)
    block = MoEBlock(local, 0, placement, "reference", dtype=torch.float32, device=CPU, mesh=mesh)
    _fill(block, mesh.shard(CONFIG))
    block.router = Forced(ids, topk_weights)  # type: ignore[assignment]
    products: list[int] = []

    def watched(*args: Any) -> Any:
        chosen = permute(*args)
        products.append(len(chosen.rows))
        return chosen

    permute, reference.permute = reference.permute, watched  # type: ignore[assignment]
    out = block(x, most_rows=max(rows, default=None))
    reference.permute = permute
    return {"out": out, "sent": mesh.traffic.take(), "products": sum(products)}


def _fill(block: MoEBlock, shard: Shard) -> None:
    w, held = weights(), shard.expert_width
    rows = slice(held.start, held.stop)
    for slot, expert in enumerate(shard.slots(0)):
        block.experts.gate_up.data[slot] = torch.cat((w["gate"][expert, rows], w["up"][expert, rows]))
        block.experts.down.data[slot] = w["down"][expert, :, rows]
    rows = slice(shard.shared_width.start, shard.shared_width.stop)
    assert block.shared is not None
    assert block.shared_gate is not None
    block.shared.gate_up.weight.data.copy_(torch.cat((w["shared_gate"][rows], w["shared_up"][rows])))
    block.shared.down.weight.data.copy_(w["shared_down"][:, rows])
    block.shared_gate.weight.data.copy_(w["scale"])
    for linear in (block.shared.gate_up, block.shared.down, block.shared_gate):
        linear.pack(prepack=False)


def expected(x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    w = weights()
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for expert, weight in zip(ids[row].tolist(), topk_weights[row].tolist(), strict=True):
            hidden = F.silu(w["gate"][expert] @ x[row]) * (w["up"][expert] @ x[row])
            out[row] += weight * (w["down"][expert] @ hidden)
    shared = (F.silu(x @ w["shared_gate"].T) * (x @ w["shared_up"].T)) @ w["shared_down"].T
    return out + shared * torch.sigmoid(x @ w["scale"].T)


def routed(rows: int, how: str, placement: ExpertPlacement) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(rows)])
    if how == "one expert":
        ids[:, 0] = 3
        ids[:, 1] = torch.where(ids[:, 1] == 3, 4, ids[:, 1])
    elif how == "one rank":  # the others get no token, where the placement allows it
        held = sorted(set(max(placement.slots, key=len)))
        ids = torch.tensor([held[:K] if len(held) >= K else [0, 1]] * rows)
    return torch.randn(rows, H), ids, torch.rand(rows, K).softmax(-1)


def plan_of(size: int, name: str, slots: tuple[tuple[int, ...], ...] | None) -> ParallelPlan:
    degrees, dispatch = PLANS[name]
    tp, ep = degrees(size)
    fits = slots is not None and len(slots) == ep
    placements: dict[int | None, ExpertPlacement] = {None: ExpertPlacement(E, slots)} if fits else {}  # type: ignore[arg-type]
    return ParallelPlan(tp, ep, moe_dispatch=dispatch, placements=placements)


def scenarios(size: int, name: str) -> list[ParallelPlan]:
    ep = PLANS[name][0](size)[1]
    tables = PLACEMENTS[ep].values() if ep > 1 else [None]
    return [plan_of(size, name, slots) for slots in tables]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("size", [2, 4])
def test_every_dispatcher_gives_what_one_process_gives(pools: dict[int, Pool], size: int, name: str) -> None:
    for plan in scenarios(size, name):
        routings = [(how, rows) for how in ROUTINGS for rows in (1, 3, 17)]  # fewer tokens than ranks among them
        cases = [dict(zip(("x", "ids", "topk_weights"), routed(n, how, plan.placement(E, 0)), strict=True))
                 for how, n in routings]  # fmt: skip
        found = pools[size].call(layers, plan=plan, cases=cases)
        for number, case in enumerate(cases):
            ranks = [got[number] for got in found]
            for got in ranks:
                assert torch.equal(got["out"], ranks[0]["out"])  # the same bits on all ranks
                torch.testing.assert_close(got["out"], expected(**case), atol=2e-5, rtol=1e-5)
            # Each choice is computed once; with slices once by each of the ranks that share it.
            assert sum(got["products"] for got in ranks) == len(case["x"]) * K * plan.expert_tensor_size


def test_only_the_rows_of_own_experts_enter_products(pools: dict[int, Pool]) -> None:
    plan = ParallelPlan(2, 2)
    x, ids, topk_weights = routed(17, "random", plan.placement(E))
    found = pools[2].call(layer, plan=plan, x=x, ids=ids, topk_weights=topk_weights)
    assert [got["products"] for got in found] == [int((ids < E // 2).sum()), int((ids >= E // 2).sum())]


@pytest.mark.parametrize("name", ["tensor", "expert", "hybrid"])
@pytest.mark.parametrize("size", [2, 4])
def test_an_all_reduce_sends_what_the_formula_says(pools: dict[int, Pool], size: int, name: str) -> None:
    """2 f T H b, f = (P - 1) / P, whichever way the experts are shared."""
    x, ids, topk_weights = routed(17, "random", ExpertPlacement.contiguous(E))
    for got in pools[size].call(layer, plan=plan_of(size, name, None), x=x, ids=ids, topk_weights=topk_weights):
        assert got["sent"] == {"combine": 2 * (size - 1) * 17 * H * 4 / size}


@pytest.mark.parametrize("size", [2, 4])
def test_one_copy_for_each_token_and_rank(pools: dict[int, Pool], size: int) -> None:
    """Experts on every rank, both choices of a token on one: D = 1, and (D / P) f T H b each way where it is even."""
    plan = ParallelPlan(size, size, moe_dispatch="all_to_all")
    held = plan.placement(E)
    pairs = [held.slots[r][:2] if len(held.slots[r]) > 1 else (held.slots[r][0], held.slots[0][0]) for r in range(size)]
    rows = size * size
    ids = torch.tensor([pairs[row % size] for row in range(rows)])
    x, _, topk_weights = routed(rows, "random", held)
    found = pools[size].call(layer, plan=plan, x=x, ids=ids, topk_weights=topk_weights)
    ranks_of = {expert: rank for rank, slots in enumerate(held.slots) for expert in slots}
    distinct = [{ranks_of[int(expert)] for expert in row} for row in ids]
    for rank, got in enumerate(found):
        own = range(rank * size, (rank + 1) * size)
        copies = sum(len(distinct[row] - {rank}) for row in own)
        back = sum(rank in distinct[row] for row in range(rows) if row not in own)
        assert got["sent"]["dispatch"] == copies * H * 4
        assert got["sent"]["combine"] == back * H * 4
        assert got["sent"]["routing"] == copies * 2 * K * 4
        assert got["sent"]["rows"] == (size - 1) * size * H * 4  # f T H b: every rank gets all rows back
        if size == 2:
            assert got["sent"]["dispatch"] == (1 / size) * (size - 1) / size * rows * H * 4


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_uniform_routing(pools: dict[int, Pool], size: int) -> None:
    """All K = E experts chosen: D = P, and dispatch and combine send (D / P) f T H b each, exactly."""
    plan = ParallelPlan(size, size, moe_dispatch="all_to_all")
    rows = 4 * size
    ids = torch.arange(E).repeat(rows, 1)
    x = torch.randn(rows, H)
    for got in pools[size].call(layer, plan=plan, x=x, ids=ids, topk_weights=torch.rand(rows, E)):
        formula = (size - 1) / size * rows * H * 4
        assert got["sent"]["dispatch"] == got["sent"]["combine"] == formula


def test_bytes_of_the_hybrid(pools: dict[int, Pool]) -> None:
    """To and from the ep ranks D(Pe) = Pe copies, and (Pt - 1) / Pt of the received rows among the slices."""
    plan = ParallelPlan(4, 2, moe_dispatch="all_to_all")
    rows = 16
    ids = torch.arange(E).repeat(rows, 1)
    found = pools[4].call(layer, plan=plan, x=torch.randn(rows, H), ids=ids, topk_weights=torch.rand(rows, E))
    for got in found:
        own, row = rows // 4, H * 4
        assert got["sent"]["dispatch"] == got["sent"]["combine"] == own * row  # to the one other ep rank
        received = 2 * own * 2  # from both ep ranks, by both slices
        assert got["sent"]["slice_dispatch"] == got["sent"]["slice_combine"] == received / 2 * row


def test_two_dispatches_are_the_same_bits(pools: dict[int, Pool]) -> None:
    for name in PLANS:
        plan = plan_of(4, name, None)
        x, ids, topk_weights = routed(17, "random", plan.placement(E))
        first, second = (pools[4].call(layer, plan=plan, x=x, ids=ids, topk_weights=topk_weights) for _ in range(2))
        assert torch.equal(first[0]["out"], second[0]["out"])


DATA_PLANS = {  # tensor and expert degrees by the number of ranks, half of them data ranks (4: or all of them)
    2: [(1, 1), (1, 2)],
    4: [(2, 1), (2, 2), (2, 4), (1, 4)],
}


@pytest.mark.parametrize("dispatch", ["all_reduce", "all_to_all"])
@pytest.mark.parametrize("size", [2, 4])
def test_data_ranks_have_rows_of_their_own(pools: dict[int, Pool], size: int, dispatch: str) -> None:
    """One without any, fewer rows than ranks, all tokens on one expert or rank, replicas."""
    for tp, ep in DATA_PLANS[size]:
        data = size // tp
        for slots in (None, PLACEMENTS[ep]["replicas"]) if ep > 1 else (None,):
            placements = {} if slots is None else {None: ExpertPlacement(E, slots)}
            plan = ParallelPlan(tp, ep, data_parallel_size=data, moe_dispatch=dispatch, placements=placements)
            cases = []
            for rows in ((3, 0), (0, 1), (5, 17)):
                for how in ROUTINGS:
                    x, ids, topk_weights = routed(sum(rows), how, plan.placement(E, 0))
                    own = (*rows, *[0] * (data - 2))
                    cases.append({"x": x, "ids": ids, "topk_weights": topk_weights, "rows": own})
            found = pools[size].call(layers, plan=plan, cases=cases)
            for number, case in enumerate(cases):
                compare(plan, case, [got[number] for got in found])


def compare(plan: ParallelPlan, case: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    parts = expected(case["x"], case["ids"], case["topk_weights"]).split(case["rows"])
    tp = plan.tensor_parallel_size
    for rank, got in enumerate(ranks):
        torch.testing.assert_close(got["out"], parts[rank // tp], atol=2e-5, rtol=1e-5)
        assert torch.equal(got["out"], ranks[rank // tp * tp]["out"])  # the same bits on the ranks that share the rows
    assert sum(got["products"] for got in ranks) == len(case["x"]) * K * plan.expert_tensor_size


@pytest.mark.parametrize(("size", "tp", "ep"), [(2, 1, 2), (4, 2, 2), (4, 1, 1)])
def test_bytes_of_gathered_rows(pools: dict[int, Pool], size: int, tp: int, ep: int) -> None:
    """(D - 1) m rows there and back, m the rows of the data rank that has most; then an all-reduce of the own rows."""
    data, rows = size // tp, (5, 17, 0, 2)[: size // tp]
    plan = ParallelPlan(tp, ep, data_parallel_size=data)
    x, ids, topk_weights = routed(sum(rows), "random", plan.placement(E))
    found = pools[size].call(layer, plan=plan, x=x, ids=ids, topk_weights=topk_weights, rows=rows)
    for rank, got in enumerate(found):
        gathered = (data - 1) * 17
        assert got["sent"]["dispatch"] == gathered * H * 4
        assert got["sent"]["routing"] == gathered * 8 * K
        assert got["sent"]["combine"] == gathered * H * 4 + 2 * (tp - 1) / tp * rows[rank // tp] * H * 4
