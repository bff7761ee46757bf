"""The down projection of chosen experts, row by row and grouped, against torch; and both halves behind each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import expert_down as reference
from flexmoe.kernels.triton.expert_down import (
    DownGemvTile,
    DownTile,
    default_gemv_tile,
    default_tile,
    expert_down_gemv,
    expert_down_grouped,
)
from flexmoe.kernels.triton.expert_gate_up import GateUpGemvTile, expert_gate_up_gemv
from flexmoe.kernels.triton.topk import topk
from tests.kernels.routing import ROUTINGS, filled, gaps, grouped, tails
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, Guarded, assert_near, normal, poisoned

# numpy in Triton's interpreter: of a range whose end is known at run time only, and of NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

E = 6
SHAPES = [(6, 136), (5, 33), (1, 1)] + ([(2048, 768), (1026, 1000), (720, 2880)] if ON_GPU else [])
GEMV_TILES = [
    DownGemvTile(1, 128, num_warps=1),
    DownGemvTile(4, 256, num_warps=4),
    DownGemvTile(2, 128, num_warps=2, num_stages=3),
    *([DownGemvTile(4, 512, 8, num_stages=3), DownGemvTile(4, 1024, 8)] if ON_GPU else []),
]
TILES = [
    DownTile(16, 16, 32, num_stages=2),
    DownTile(16, 32, 16, num_stages=3, swap=False, group=2),
    DownTile(16, 16, 16, num_stages=2, swap=False, tail=16),
    *([DownTile(16, 64, 64, num_stages=4), DownTile(64, 128, 64, num_stages=3, swap=False)] if ON_GPU else []),
]


def weights_of(H: int, F: int, dtype: torch.dtype, experts: int = E) -> Tensor:
    return normal(experts, H, F, dtype=dtype, scale=F**-0.5)


def case(
    T: int, H: int, F: int, K: int, choose: Callable[..., Tensor], dtype: torch.dtype, experts: int = E
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, ids, weights and down; NaN in everything that nobody may read."""
    hidden, ids = normal(T * K, F, dtype=dtype), choose(T, experts, K)
    scales, down = torch.rand(T, K, device=DEVICE), weights_of(H, F, dtype, experts)
    idle = sorted(set(range(experts)) - set(ids.flatten().tolist()))
    hidden[ids.flatten() < 0], scales[ids < 0], down[idle] = float("nan"), float("nan"), float("nan")
    return hidden, ids, scales, down


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choose", ROUTINGS)
@pytest.mark.parametrize("tile", [*GEMV_TILES, None])
@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize(("H", "F"), SHAPES)
def test_gemv_adds_to_the_residual_stream(
    H: int, F: int, K: int, tile: DownGemvTile | None, choose: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    T = 2
    hidden, ids, scales, down = case(T, H, F, K, choose, dtype)
    before = normal(T, H)
    outs = [Guarded(T, H) for _ in range(2)]
    for out in outs:
        out.tensor.copy_(before)
        expert_down_gemv(hidden, ids, scales, down, out.tensor, tile=tile)
    wanted = reference.expert_down(hidden, ids, scales, down).view(T, K, H).sum(1)
    assert_near(outs[0].check(), before + wanted, torch.float32 if dtype is torch.float32 else dtype)
    assert torch.equal(outs[0].tensor, outs[1].tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choose", ROUTINGS)
@pytest.mark.parametrize("tile", [*TILES, None])
@pytest.mark.parametrize("T", [1, 5, 20])
@pytest.mark.parametrize(("H", "F"), [(48, 64), (5, 33)])
def test_grouped(
    H: int, F: int, T: int, tile: DownTile | None, choose: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    check_grouped(T, H, F, 2, E, tile, choose, dtype)


def check_grouped(
    T: int, H: int, F: int, K: int, experts: int, tile: DownTile | None, choose: Callable[..., Tensor],
    dtype: torch.dtype, y_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    hidden, ids, scales, down = case(T, H, F, K, choose, dtype, experts)
    rows, counts = grouped(ids, experts)
    outs = [Guarded(T * K, H, dtype=y_dtype or dtype) for _ in range(2)]
    for out in outs:
        expert_down_grouped(hidden, rows, counts, scales, down, out.tensor, tile=tile)
    here = ids.flatten() >= 0
    if here.any():
        assert_near(outs[0].check()[here], reference.expert_down(hidden, ids, scales, down)[here], dtype)
    assert outs[0].tensor[~here].isnan().all()
    assert torch.equal(outs[0].tensor.nan_to_num(), outs[1].tensor.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_into_fp32(dtype: torch.dtype) -> None:
    check_grouped(7, 48, 32, 2, E, TILES[0], gaps, dtype, y_dtype=torch.float32)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("H", "F"), [(48, 64), (20, 36)])
def test_grouped_through_the_tensor_memory_accelerator(H: int, F: int, swap: bool) -> None:
    dtype, block = (torch.bfloat16, 64) if ON_GPU else (torch.float32, 16)
    tile = DownTile(16, block, block, num_stages=3, swap=swap, tma=True)
    check_grouped(9, H, F, 2, E, tile, gaps, dtype)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("H", "F"), [(48, 64), (20, 36)])
def test_the_rows_behind_an_experts_last_block(H: int, F: int, number: int, tma: bool, swap: bool) -> None:
    dtype, block, tail = (torch.bfloat16, 64, 32) if ON_GPU else (torch.float32, 16, 16)
    ids = filled(tails(block, tail)[number])
    tile = DownTile(block, block, block, num_stages=3, swap=swap, tma=tma, group=2, tail=tail)
    check_grouped(len(ids), H, F, 1, max(2, int(ids.max()) + 2), tile, lambda *_: ids, dtype)


@pytest.mark.skipif(not ON_GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("choose", ROUTINGS)
@pytest.mark.parametrize("T", [4, 16, 100, 700])
@pytest.mark.parametrize(("H", "F", "experts", "K"), [(2048, 768, 128, 8), (1024, 4096, 6, 2), (2880, 720, 32, 4)])
def test_grouped_at_the_sizes_of_models(
    H: int, F: int, experts: int, K: int, T: int, choose: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    first = default_tile(T, K, experts, H, F, dtype)
    for tile in (
        first,
        DownTile(first.block_m, 64, 64, num_stages=3, tma=True),
        DownTile(64, 128, 64, 8, 4, False),
        *(DownTile(128, 256, 64, 8, 3, False, tma, 8, tail) for tma in (False, True) for tail in (16, 32)),
    ):
        check_grouped(T, H, F, K, experts, tile, choose, dtype)


def both_halves(
    x: Tensor, logits: Tensor, lengths: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor, *, early: bool,
    pdl: bool = False,
) -> None:  # fmt: skip
    """A MoE layer of a few rows, as a decode step runs it."""
    T, K, F = x.shape[0], 2, down.shape[2]
    ids, scales = torch.empty(T, K, dtype=torch.int32, device=DEVICE), poisoned(T, K)
    hidden = poisoned(T * K, F, dtype=x.dtype)
    columns = 1024 if ON_GPU else 128
    expert_gate_up_gemv(
        x, logits, ids, scales, gate_up, hidden, renormalize=True, lengths=lengths, pdl=pdl,
        tile=GateUpGemvTile(columns=columns, num_warps=2, pairs=4, late_trigger=early),
    )  # fmt: skip
    tile = DownGemvTile(2, columns, num_warps=2, early_ids=early)
    expert_down_gemv(hidden, ids, scales, down, residual, logits=logits, lengths=lengths, tile=tile, pdl=pdl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("F", [16, 132])
def test_experts_chosen_early_are_the_same(F: int, dtype: torch.dtype) -> None:
    T, H = 3, 8
    x, logits, before = normal(T, H, dtype=dtype), normal(T, E), normal(T, H)
    logits[0] = 1.0  # ties
    lengths = torch.tensor([1, 0, 9], dtype=torch.int32, device=DEVICE)
    gate_up, down = normal(E, 2 * F, H, dtype=dtype, scale=H**-0.5), weights_of(H, F, dtype)
    late, early = before.clone(), before.clone()
    both_halves(x, logits, lengths, gate_up, down, late, early=False)
    both_halves(x, logits, lengths, gate_up, down, early, early=True)
    assert torch.equal(late, early)
    assert torch.equal(late[1], before[1])
    assert not torch.equal(late[0], before[0])


@pytest.mark.skipif(not ON_GPU, reason="kernels overlap on a GPU only")
@pytest.mark.parametrize("early", [False, True])
def test_overlapping_kernels_in_a_graph_give_the_same_bits(early: bool) -> None:
    """A chain of layers in one buffer each, so that a kernel that reads too early reads the layer before."""
    T, H, F, layers = 2, 1024, 768, 8
    dtype = torch.bfloat16
    gate_up, down = normal(E, 2 * F, H, dtype=dtype, scale=H**-0.5), weights_of(H, F, dtype)
    routers, lengths = [normal(E, H) for _ in range(layers)], torch.ones(T, dtype=torch.int32, device=DEVICE)
    residual, x, logits = normal(T, H), poisoned(T, H, dtype=dtype), poisoned(T, E)
    unused = torch.empty(T, 2, dtype=torch.int32, device=DEVICE), poisoned(T, 2)
    start = residual.clone()

    def step(pdl: bool) -> None:
        for router in routers:
            x.copy_(torch.tanh(residual))
            torch.mm(x.float(), router.T, out=logits)
            topk(
                logits, *unused, renormalize=True, pdl=False
            )  # the next kernel's predecessor, which has no early start
            both_halves(x, logits, lengths, gate_up, down, residual, early=early, pdl=pdl)

    step(False)
    wanted = residual.clone()
    residual.copy_(start)
    step(True)
    assert torch.equal(residual, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(True)
    for _ in range(5):
        residual.copy_(start)
        graph.replay()
        assert torch.equal(residual, wanted)


def test_early_experts_need_logits() -> None:
    hidden, ids, scales, down = case(1, 4, 4, 2, gaps, torch.float32)
    with pytest.raises(ValueError, match="early_ids chooses experts from the router's logits"):
        expert_down_gemv(hidden, ids, scales, down, normal(1, 4), tile=DownGemvTile(early_ids=True))


def test_default_tiles() -> None:
    assert default_gemv_tile(8, 768, torch.bfloat16) == DownGemvTile(2, 1024, 8)
    assert default_gemv_tile(2, 14336, torch.bfloat16) == DownGemvTile(2, 2048, 8)
    assert default_gemv_tile(8, 1024, torch.bfloat16) == DownGemvTile(2, 512, 8)
    blocks = [default_tile(T, 2, 8, 4096, 14336, torch.bfloat16).block_m for T in (8, 32, 64, 256, 2048)]
    assert blocks == sorted(blocks)
    assert (blocks[0], blocks[-1]) == (16, 128)
