"""Rows of all ranks in one launch, against torch: one rank at a time, and on a GPU all of them at once."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels import gather_rows as reference
from flexmoe.kernels.triton.all_reduce import all_reduce
from flexmoe.kernels.triton.gather_rows import gather_rows
from tests.kernels.peer_ranks import PeerRanks
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, Guarded

SHAPES = [(2, 1, 64), (2, 5, 100), (3, 4, 48), (4, 2, 1), (8, 3, 40)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32])
@pytest.mark.parametrize(("P", "T", "H"), SHAPES)
def test_every_rank_has_all_rows_tells_the_others_and_clears_its_flags(
    P: int, T: int, H: int, dtype: torch.dtype
) -> None:
    for rank in range(P):
        ranks = PeerRanks(P, T, H, torch.float32 if dtype is torch.int32 else dtype)
        if dtype is torch.int32:
            ranks.parts = [(100 * part.nan_to_num()).int() for part in ranks.parts]
        out = torch.zeros(P * T, H, dtype=dtype, device=DEVICE)
        ranks.others_have_told(rank, T)
        gather_rows(ranks.seen_by(rank), out)
        assert torch.equal(out, reference.gather_rows([part[:T] for part in ranks.parts]))
        ranks.assert_told(rank, T)


def test_nothing_is_written_beside_the_rows() -> None:
    ranks, out = PeerRanks(2, 3, 48, torch.float32), Guarded(6, 48)
    ranks.others_have_told(1, 3)
    gather_rows(ranks.seen_by(1), out.tensor)
    assert torch.equal(out.check(), reference.gather_rows([part[:3] for part in ranks.parts]))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs one launch at a time")
@pytest.mark.parametrize(("P", "T", "H"), [(2, 5, 100), (4, 32, 4096)])
def test_data_ranks_that_run_at_once_exchange_in_turn(P: int, T: int, H: int) -> None:
    """Rows of all to each, these as parts of a sum, and the own rows of it back: ten times in the same two memories."""
    rows, sums = PeerRanks(P, T, H, torch.bfloat16), PeerRanks(P, P * T, H, torch.bfloat16)
    start = [part[:T].clone() for part in rows.parts]
    seen = [(rows.seen_by(rank), sums.seen_by(rank)) for rank in range(P)]
    found = [torch.zeros(T, H, device=DEVICE) for _ in range(P)]

    def exchange(rank: int) -> None:
        own, parts = seen[rank]
        gather_rows(own, parts.part[: P * T])
        all_reduce(parts, found[rank], accumulate=False, first=rank * T)
        own.part[:T].copy_(found[rank].div_(P))  # what it was, with no memory to wait for

    for rank in range(P):  # compiled before ranks wait for each other
        rows.others_have_told(rank, T)
        sums.others_have_told(rank, T)
        exchange(rank)
        rows.parts[rank][:T].copy_(start[rank])
        for flags in (*rows.flags, *sums.flags):
            flags.zero_()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(P)]
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for _ in range(10):
                exchange(rank)
    torch.cuda.synchronize()
    for rank, x in enumerate(found):
        assert torch.equal(x, start[rank].float())  # P is a power of two: nothing is rounded
    assert not any(flags.any() for flags in (*rows.flags, *sums.flags))
