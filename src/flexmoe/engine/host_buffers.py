"""HostBuffers: where the host writes what a step is given, again and again. Leaves: copies on the device."""

from __future__ import annotations

import torch
from torch import Tensor

# Buffers that take turns: of one step that runs, one that waits behind it, one that is being written.
BUFFERS = 3


class HostBuffers:
    """Buffers of one size, pinned for a GPU. Before one is written again its copy must be over: for steps that were
    given up nobody else waits.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.all = [torch.zeros(size, dtype=dtype, pin_memory=pinned) for _ in range(BUFFERS)]
        self._sent = [torch.cuda.Event() for _ in range(BUFFERS)] if pinned else []
        self._turn = 0

    def take(self) -> int:
        """The number of the next one, which may be written from now on until it is sent."""
        self._turn = (self._turn + 1) % BUFFERS
        if self._sent:
            self._sent[self._turn].synchronize()
        return self._turn

    def send(self, to: Tensor, size: int) -> None:
        """Copy the first numbers of the one taken last to the start of `to`, behind what runs on the device."""
        to[:size].copy_(self.all[self._turn][:size], non_blocking=True)
        if self._sent:
            self._sent[self._turn].record()
