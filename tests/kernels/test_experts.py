"""The expert backend `triton`, which joins grouping, both halves of an expert and the sum, against `reference`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexmoe.moe.experts.reference import ReferenceExperts
from flexmoe.moe.experts.triton import TritonExperts
from tests.kernels.routing import ROUTINGS, gaps, spread
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, assert_near, normal, refusing_to_wait

# numpy in Triton's interpreter, of a range whose end is known at run time only
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

SHAPES = [(6, 2, 24, 20)] + ([(128, 8, 2048, 768), (64, 8, 2048, 1024), (6, 2, 1024, 4096)] if ON_GPU else [])


def experts(E: int, H: int, F: int, dtype: torch.dtype, device: torch.device = DEVICE) -> TritonExperts:
    made = TritonExperts(E, H, F, dtype=dtype, device=device)
    made.gate_up.data = normal(E, 2 * F, H, dtype=dtype, scale=H**-0.5)
    made.down.data = normal(E, H, F, dtype=dtype, scale=F**-0.5)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choose", ROUTINGS)
@pytest.mark.parametrize("rows", [1, 3, 40] + ([300, 2048] if ON_GPU else []))
@pytest.mark.parametrize(("E", "K", "H", "F"), SHAPES)
def test_the_weighted_sum_of_each_row(
    E: int, K: int, H: int, F: int, rows: int, choose: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    ours = experts(E, H, F, dtype)
    exact = ReferenceExperts(E, H, F, dtype=torch.float32, device=DEVICE)
    exact.gate_up.data, exact.down.data = ours.gate_up.float(), ours.down.float()
    x, ids, weights = normal(rows, H, dtype=dtype), choose(rows, E, K).long(), torch.rand(rows, K, device=DEVICE)
    idle = sorted(set(range(E)) - set(ids.flatten().tolist()))
    ours.gate_up.data[idle], ours.down.data[idle] = float("nan"), float("nan")
    with torch.inference_mode():
        found = ours(x, ids, weights.masked_fill(ids < 0, float("nan")))
        again = ours(x, ids, weights)
        wanted = exact(x.float(), ids, weights)
    assert found.dtype is dtype
    assert torch.equal(found, again)
    if wanted.any():
        assert_near(found, wanted, dtype)
    assert not found[(ids < 0).all(1)].any()


def test_no_rows_and_views_as_inputs() -> None:
    ours = experts(6, 24, 20, torch.float32)
    x, ids, weights = normal(5, 48)[:, ::2], spread(5, 6, 4)[:, :2], torch.rand(5, 4, device=DEVICE)[:, :2]
    assert torch.equal(ours(x, ids, weights), ours(x.contiguous(), ids.contiguous(), weights.contiguous()))
    assert ours(x[:0], ids[:0], weights[:0]).shape == (0, 24)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU to wait for, and to capture")
def test_nothing_waits_for_the_host() -> None:
    ours = experts(64, 1024, 512, torch.bfloat16)
    x, ids, weights = normal(33, 1024, dtype=torch.bfloat16), gaps(33, 64, 8).long(), torch.rand(33, 8, device=DEVICE)
    eager = ours(x, ids, weights)
    with refusing_to_wait():
        ours(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(x, ids, weights)
    for _ in range(3):  # other rows and other choices through the same graph
        x.copy_(normal(33, 1024, dtype=torch.bfloat16))
        ids.copy_(gaps(33, 64, 8))
        eager = ours(x, ids, weights)
        graph.replay()
        assert torch.equal(captured, eager)
