"""Memory that every GPU of a group reads and writes in kernels, over NVLink or PCIe; no switch takes part (multicast).

Enters: a group whose ranks are on one machine. Leaves: addresses. torch.distributed's symmetric memory makes it, which
torch marks as new, so everything of it is here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexmoe.parallel.child import SAFE_ENVIRONMENT
from flexmoe.parallel.comm import Group

_FLAG_BYTES = 4


@dataclass(frozen=True, slots=True)
class Shared:
    """Rows [rows, width] of each of P ranks, and flags int32 [P, rows] of each, 0 at first.

    own: this rank's rows. rows, flags: int64 [P] on the device, the addresses of every rank's.
    """

    own: Tensor
    rows: Tensor
    flags: Tensor


def why_not_shared(group: Group, device: torch.device, *, one_machine: bool) -> str:
    """Why kernels cannot read the memory of the group's other ranks; "" if they can. All ranks of it must ask.

    one_machine: whether the ranks are on this one. Assumes rank i of a machine on GPU i.
    """
    if group.handle is None or device.type != "cuda":
        return "the ranks are not on GPUs"
    if not one_machine:
        return "the ranks are on several machines"
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    sees = len(others) + 1 >= group.size and all(torch.cuda.can_device_access_peer(device.index, i) for i in others)
    return "" if group.minimum(int(sees), device) else "not every GPU can read the others' memory"


def share(group: Group, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Shared:
    """Memory for one exchange at a time. All ranks of the group call this together, after `why_not_shared`."""
    import torch.distributed._symmetric_memory as symmetric

    assert group.handle is not None
    for name, value in SAFE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    data = -(-rows * width * dtype.itemsize // 16) * 16
    memory: Tensor = symmetric.empty(data + group.size * rows * _FLAG_BYTES, dtype=torch.uint8, device=device)
    memory.zero_()
    bases = _addresses(symmetric.rendezvous(memory, group.handle), memory, group)
    group.minimum(0, device)  # all flags are 0 before anyone sets one
    own = memory[: rows * width * dtype.itemsize].view(dtype).view(rows, width)
    return Shared(own, bases, bases + data)


def _addresses(handle: Any, memory: Tensor, group: Group) -> Tensor:
    """Of every rank's memory on this device, int64 [P]."""
    found = [address + handle.offset for address in handle.buffer_ptrs]
    assert found[group.index] == memory.data_ptr()
    return torch.tensor(found, device=memory.device)
