"""Norms of queries and keys whose heads several ranks share, against torch, one rank at a time."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels import qk_norm_over_ranks as reference
from flexmoe.kernels.decode_attention import QKNormWeights
from flexmoe.kernels.triton.qk_norm_over_ranks import norm_by_sums, qk_norm_over_ranks, sum_squares
from tests.kernels.peer_ranks import PeerRanks
from tests.kernels.support import DTYPES, Guarded, assert_near, normal

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "T", "q", "kv"), [(2, 1, 64, 16), (2, 5, 96, 40), (3, 2, 32, 32), (4, 3, 128, 16)])
def test_means_are_over_the_heads_of_all_ranks(P: int, T: int, q: int, kv: int, dtype: torch.dtype) -> None:
    parts = [normal(T, q + 2 * kv, dtype=dtype, scale=1 + rank) for rank in range(P)]
    norms = [QKNormWeights(normal(q, dtype=dtype), normal(kv, dtype=dtype), EPS, full=True) for _ in range(P)]
    expected = reference.qk_norm_over_ranks(parts, norms)
    for rank in range(P):
        ranks, out = PeerRanks(P, T, 2, torch.float32), Guarded(T, q + 2 * kv, dtype=dtype)
        out.tensor.copy_(parts[rank])
        for memory, part in zip(ranks.parts, parts, strict=True):
            queries, keys = part.float()[:, :q], part.float()[:, q : q + kv]
            memory[:T] = torch.stack((queries.square().sum(-1), keys.square().sum(-1)), -1)
        own = ranks.parts[rank][:T].clone()
        ranks.parts[rank][:T] = torch.nan
        ranks.others_have_told(rank, T)
        qk_norm_over_ranks(ranks.seen_by(rank), out.tensor, norms[rank])
        assert_near(out.check(), expected[rank], dtype)
        assert torch.equal(out.tensor[:, q + kv :], parts[rank][:, q + kv :])
        assert_near(ranks.parts[rank][:T], own, torch.float32)
        ranks.assert_told(rank, T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "T", "q", "kv"), [(2, 70, 64, 16), (2, 5, 96, 40), (3, 2, 32, 32), (4, 300, 128, 16)])
def test_sums_that_ranks_add_up_between_two_launches_give_the_same(
    P: int, T: int, q: int, kv: int, dtype: torch.dtype
) -> None:
    parts = [normal(T, q + 2 * kv, dtype=dtype, scale=1 + rank) for rank in range(P)]
    norms = [QKNormWeights(normal(q, dtype=dtype), normal(kv, dtype=dtype), EPS, full=True) for _ in range(P)]
    expected = reference.qk_norm_over_ranks(parts, norms)
    sums = torch.stack([sum_squares(part, norm) for part, norm in zip(parts, norms, strict=True)]).sum(0)
    for rank in range(P):
        out = Guarded(T, q + 2 * kv, dtype=dtype)
        out.tensor.copy_(parts[rank])
        norm_by_sums(out.tensor, sums, norms[rank], P)
        assert_near(out.check(), expected[rank], dtype)
        assert torch.equal(out.tensor[:, q + kv :], parts[rank][:, q + kv :])
