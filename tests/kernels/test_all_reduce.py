"""The sum over ranks in one launch, against torch: one rank at a time, and on a GPU all of them at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import all_reduce as reference
from flexmoe.kernels.rms_norm import rms_norm
from flexmoe.kernels.triton.all_reduce import all_reduce
from flexmoe.kernels.triton.norm_linear import NormAfter
from tests.kernels.peer_ranks import PeerRanks
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, Guarded, assert_near, normal

SHAPES = [(2, 1, 64), (2, 5, 100), (3, 4, 48), (4, 2, 128), (8, 3, 40)]


def total(ranks: PeerRanks, T: int, x: Tensor | None = None) -> Tensor:
    return reference.all_reduce([part[:T] for part in ranks.parts], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "T", "H"), SHAPES)
def test_every_rank_adds_up_tells_the_others_and_clears_its_flags(P: int, T: int, H: int, dtype: torch.dtype) -> None:
    for rank in range(P):
        ranks, out = PeerRanks(P, T, H, dtype), Guarded(T, H)
        ranks.others_have_told(rank, T)
        all_reduce(ranks.seen_by(rank), out.tensor, accumulate=False)
        assert torch.equal(out.check(), total(ranks, T))
        ranks.assert_told(rank, T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "T", "H"), SHAPES)
def test_adds_to_the_residual_stream_and_norms_it(P: int, T: int, H: int, dtype: torch.dtype) -> None:
    ranks, before, x, normed = PeerRanks(P, T, H, dtype), normal(T, H), Guarded(T, H), Guarded(T, H, dtype=dtype)
    weight = normal(H, dtype=dtype)
    x.tensor.copy_(before)
    ranks.others_have_told(1, T)
    all_reduce(ranks.seen_by(1), x.tensor, accumulate=True, norm=NormAfter(weight, 1e-5, normed.tensor))
    expected = total(ranks, T, before)
    assert_near(x.check(), expected, torch.float32)
    assert_near(normed.check(), rms_norm(expected, weight, 1e-5).to(dtype), dtype)


@pytest.mark.parametrize("first", [1, 3])
def test_rows_of_its_own_from_the_sum_of_all(first: int) -> None:
    ranks, out = PeerRanks(3, 5, 48, torch.float32), Guarded(2, 48)
    ranks.others_have_told(1, 2)
    all_reduce(ranks.seen_by(1), out.tensor, accumulate=False, first=first)
    assert torch.equal(out.check(), total(ranks, 5)[first : first + 2])
    ranks.assert_told(1, 2)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs one launch at a time")
@pytest.mark.parametrize(("P", "T", "H"), [*SHAPES, (4, 32, 4096)])
def test_ranks_that_run_at_once_wait_for_each_other(P: int, T: int, H: int) -> None:
    """Two memories in turn, as layers use them; each rank on a stream of its own, all getting the same bits."""
    turns = [PeerRanks(P, T, H, torch.bfloat16) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(P)]
    found = [torch.zeros(T, H, device=DEVICE) for _ in range(P)]
    seen = [[turn.seen_by(rank) for turn in turns] for rank in range(P)]
    for rank, peers in enumerate(seen):  # compiled before ranks wait for each other
        turns[0].others_have_told(rank, T)
        all_reduce(peers[0], found[rank], accumulate=True)
        found[rank].zero_()
        for flags in turns[0].flags:
            flags.zero_()
    torch.cuda.synchronize()
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for number in range(10):
                all_reduce(seen[rank][number % 2], found[rank], accumulate=True)
    torch.cuda.synchronize()
    expected = torch.zeros(T, H, device=DEVICE)
    for number in range(10):
        expected = total(turns[number % 2], T, expected)
    for x in found:
        assert torch.equal(x, found[0])
        assert_near(x, expected, torch.float32)
    assert not any(flags.any() for turn in turns for flags in turn.flags)
