"""Memory of several ranks on one device, for kernels that read that of others."""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.kernels.triton.all_reduce import PeerRows
from tests.kernels.support import DEVICE, normal

SPARE = 2  # rows that a step does not use


class PeerRanks:
    """Memory of P ranks. parts: [T + SPARE, width] each, the last rows poisoned."""

    def __init__(self, P: int, T: int, width: int, dtype: torch.dtype) -> None:
        rows = T + SPARE
        poison = torch.full((SPARE, width), torch.nan, device=DEVICE)
        self.parts = [torch.cat((normal(T, width), poison)).to(dtype) for _ in range(P)]
        self.flags = [torch.zeros(P, rows, dtype=torch.int32, device=DEVICE) for _ in range(P)]

    def seen_by(self, rank: int) -> PeerRows:
        def addresses(tensors: list[Tensor]) -> Tensor:
            return torch.tensor([tensor.data_ptr() for tensor in tensors], device=DEVICE)

        return PeerRows(self.parts[rank], addresses(self.parts), addresses(self.flags), rank)

    def others_have_told(self, rank: int, T: int) -> None:
        """As if the other ranks had got there before."""
        self.flags[rank][:, :T] = 1
        self.flags[rank][rank] = 0

    def assert_told(self, rank: int, T: int) -> None:
        """That the rank told the others, and nothing else, and cleared its own flags."""
        for other, flags in enumerate(self.flags):
            told = torch.zeros_like(flags)
            told[rank, :T] = other != rank
            assert torch.equal(flags, told)
