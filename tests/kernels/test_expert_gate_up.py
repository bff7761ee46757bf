"""silu(gate) * up of chosen experts, row by row and grouped, against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import expert_gate_up as reference
from flexmoe.kernels import topk as reference_topk
from flexmoe.kernels.triton.expert_gate_up import (
    GateUpGemvTile,
    GateUpTile,
    default_gemv_tile,
    default_tile,
    expert_gate_up_gemv,
    expert_gate_up_grouped,
)
from tests.kernels.routing import ROUTINGS, crowded, filled, gaps, grouped, spread, tails
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, Guarded, assert_near, normal, poisoned

# numpy in Triton's interpreter: of a range whose end is known at run time only, and of NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

E, K = 6, 2
SHAPES = [(136, 6), (33, 5), (1, 1)] + ([(2048, 768), (1000, 1026), (2880, 720)] if ON_GPU else [])
GEMV_TILES = [
    GateUpGemvTile(columns=128, num_warps=2),
    GateUpGemvTile(columns=128, num_warps=1, pairs=4, steps=3, num_stages=3),
    GateUpGemvTile(columns=256, num_warps=4, pairs=2, steps=2, late_trigger=True),
    *([GateUpGemvTile(columns=512, num_stages=3), GateUpGemvTile(columns=1024, num_warps=8)] if ON_GPU else []),
]
TILES = [
    GateUpTile(16, 16, 32, num_stages=2),
    GateUpTile(16, 32, 16, num_stages=3, swap=False, group=2),
    GateUpTile(16, 16, 16, num_stages=2, swap=False, tail=16),
    *([GateUpTile(16, 64, 64, num_stages=4), GateUpTile(64, 64, 64, num_stages=3, swap=False)] if ON_GPU else []),
]


def weights_of(H: int, F: int, dtype: torch.dtype, experts: int = E) -> Tensor:
    return normal(experts, 2 * F, H, dtype=dtype, scale=H**-0.5)


def poison_idle(weights: Tensor, ids: Tensor) -> None:
    """What nobody chose may hold anything."""
    idle = sorted(set(range(weights.shape[0])) - set(ids.flatten().tolist()))
    weights[idle] = float("nan")


def check(found: Tensor, ids: Tensor, x: Tensor, gate_up: Tensor) -> None:
    """Rows with an expert are right; the others were not touched."""
    here = ids.flatten() >= 0
    if here.any():
        assert_near(found[here], reference.expert_gate_up(x, ids, gate_up)[here], x.dtype)
    assert found[~here].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choose", ROUTINGS)
@pytest.mark.parametrize("tile", [*GEMV_TILES, None])
@pytest.mark.parametrize(("H", "F"), SHAPES)
def test_gemv_with_given_experts(
    H: int, F: int, tile: GateUpGemvTile | None, choose: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    T = 2
    x, gate_up, ids = normal(T, H, dtype=dtype), weights_of(H, F, dtype), choose(T, E, K)
    poison_idle(gate_up, ids)
    outs = [Guarded(T * K, F, dtype=dtype) for _ in range(2)]
    for out in outs:
        expert_gate_up_gemv(x, None, ids, poisoned(T, K), gate_up, out.tensor, tile=tile)
    check(outs[0].check(), ids, x, gate_up)
    assert torch.equal(outs[0].tensor.nan_to_num(), outs[1].tensor.nan_to_num())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (8, 8), (40, 3)])
def test_gemv_chooses_its_experts(experts: int, top_k: int, padded: bool, renormalize: bool) -> None:
    T, H, F = 3, 32, 4
    x, gate_up, logits = normal(T, H), weights_of(H, F, torch.float32, experts), normal(T, experts)
    logits[0, :2] = logits[0].max()  # a tie
    lengths = torch.tensor([5, 0, 1], dtype=torch.int32, device=DEVICE) if padded else None
    if padded:
        x[1], logits[1] = float("nan"), float("nan")
    ids = torch.full((T + 1, top_k), -7, dtype=torch.int32, device=DEVICE)
    scales, hidden = Guarded(T, top_k), Guarded(T * top_k, F)
    expert_gate_up_gemv(
        x, logits, ids[:T], scales.tensor, gate_up, hidden.tensor, renormalize=renormalize, lengths=lengths,
        tile=GateUpGemvTile(columns=128, num_warps=2),
    )  # fmt: skip
    wanted, weights = reference_topk.topk(logits, top_k, renormalize=renormalize, lengths=lengths)
    assert torch.equal(ids[:T], wanted)
    assert (ids[T] == -7).all()
    torch.testing.assert_close(scales.check(), weights)
    check(hidden.check(), ids[:T], x, gate_up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choose", ROUTINGS)
@pytest.mark.parametrize("tile", [*TILES, None])
@pytest.mark.parametrize("T", [1, 5, 20])
@pytest.mark.parametrize(("H", "F"), [(64, 48), (33, 5)])
def test_grouped(
    H: int, F: int, T: int, tile: GateUpTile | None, choose: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    x, gate_up, ids = normal(T, H, dtype=dtype), weights_of(H, F, dtype), choose(T, E, K)
    poison_idle(gate_up, ids)
    rows, counts = grouped(ids, E)
    outs = [Guarded(T * K, F, dtype=dtype) for _ in range(2)]
    for out in outs:
        expert_gate_up_grouped(x, rows, counts, gate_up, out.tensor, top_k=K, tile=tile)
    check(outs[0].check(), ids, x, gate_up)
    assert torch.equal(outs[0].tensor.nan_to_num(), outs[1].tensor.nan_to_num())


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("H", "F"), [(64, 48), (36, 20)])
def test_grouped_through_the_tensor_memory_accelerator(H: int, F: int, swap: bool) -> None:
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x, gate_up, ids = normal(9, H, dtype=dtype), weights_of(H, F, dtype), gaps(9, E, K)
    rows, counts = grouped(ids, E)
    out = Guarded(18, F, dtype=dtype)
    tile = GateUpTile(16, 64 if ON_GPU else 16, 64 if ON_GPU else 16, num_stages=3, swap=swap, tma=True)
    expert_gate_up_grouped(x, rows, counts, gate_up, out.tensor, top_k=K, tile=tile)
    check(out.check(), ids, x, gate_up)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("H", "F"), [(64, 48), (36, 20)])
def test_the_rows_behind_an_experts_last_block(H: int, F: int, number: int, tma: bool, swap: bool) -> None:
    dtype, block, tail = (torch.bfloat16, 64, 32) if ON_GPU else (torch.float32, 16, 16)
    ids = filled(tails(block, tail)[number])
    T, experts = len(ids), max(2, int(ids.max()) + 2)
    x, gate_up = normal(T, H, dtype=dtype), weights_of(H, F, dtype, experts)
    poison_idle(gate_up, ids)
    rows, counts = grouped(ids, experts)
    out = Guarded(T, F, dtype=dtype)
    tile = GateUpTile(block, block, block, num_stages=3, swap=swap, tma=tma, group=2, tail=tail)
    expert_gate_up_grouped(x, rows, counts, gate_up, out.tensor, top_k=1, tile=tile)
    check(out.check(), ids, x, gate_up)


@pytest.mark.skipif(not ON_GPU, reason="large shapes need a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("choose", ROUTINGS)
@pytest.mark.parametrize("T", [4, 16, 100, 700])
@pytest.mark.parametrize(("H", "F", "experts", "top_k"), [(2048, 768, 128, 8), (1024, 4096, 6, 2), (2880, 720, 32, 4)])
def test_grouped_at_the_sizes_of_models(
    H: int, F: int, experts: int, top_k: int, T: int, choose: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    x, gate_up, ids = normal(T, H, dtype=dtype), weights_of(H, F, dtype, experts), choose(T, experts, top_k)
    rows, counts = grouped(ids, experts)
    first = default_tile(T, top_k, experts, H, F, dtype)
    for tile in (
        first,
        GateUpTile(first.block_m, 64, 64, num_stages=3, tma=True),
        GateUpTile(64, 128, 64, 8, 4, False),
        *(GateUpTile(128, 128, 64, 8, 4, False, tma, 16, tail) for tma in (False, True) for tail in (16, 32)),
    ):
        out = Guarded(T * top_k, F, dtype=dtype)
        expert_gate_up_grouped(x, rows, counts, gate_up, out.tensor, top_k=top_k, tile=tile)
        check(out.check(), ids, x, gate_up)


def test_strides_between_rows_of_slots_are_heeded() -> None:
    ids = spread(5, E, K)
    rows, counts = grouped(ids, E, spare=40)
    x, gate_up, out = normal(5, 32), weights_of(32, 16, torch.float32), Guarded(10, 16)
    expert_gate_up_grouped(x, rows, counts, gate_up, out.tensor, top_k=K, tile=TILES[0])
    check(out.check(), ids, x, gate_up)


def test_more_logits_than_experts_are_refused() -> None:
    ids, scales = crowded(1, E, K), poisoned(1, K)
    with pytest.raises(ValueError, match="logits has 7 columns, gate_up 6 experts"):
        expert_gate_up_gemv(
            normal(1, 8), normal(1, 7), ids, scales, weights_of(8, 4, torch.float32), poisoned(2, 4), renormalize=True
        )


def test_default_tiles() -> None:
    bf16 = torch.bfloat16
    assert default_gemv_tile(4096, bf16) == GateUpGemvTile(columns=4096, num_warps=1)
    assert default_gemv_tile(1024, bf16) == GateUpGemvTile(columns=1024, steps=2, num_warps=2)
    assert default_gemv_tile(4096, torch.float32).columns == 2048
    blocks = [default_tile(T, 8, 128, 2048, 768, bf16).block_m for T in (8, 32, 128, 256, 1024, 8192)]
    assert blocks == sorted(blocks)
    assert (blocks[0], blocks[-1]) == (16, 128)
    assert not default_tile(8, 8, 128, 2048, 768, torch.float32).swap
