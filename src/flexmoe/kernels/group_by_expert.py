"""Which assignments chose each slot: plain torch, the reference of the Triton kernel.

Enters: slot ids [T, K] (-1: none). Leaves: for each slot the indices t * K + k that chose it, ascending, and how many.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_by_expert(topk_ids: Tensor, num_slots: int) -> tuple[list[Tensor], Tensor]:
    """topk_ids [T, K] -> per slot its assignments, int32 of differing lengths, and counts int32 [num_slots].

    The kernel writes the lists into rows of one tensor instead, each as long as the longest could be.
    """
    flat = topk_ids.reshape(-1)
    lists = [(flat == slot).nonzero().flatten().to(torch.int32) for slot in range(num_slots)]
    return lists, torch.tensor([len(rows) for rows in lists], dtype=torch.int32, device=flat.device)
