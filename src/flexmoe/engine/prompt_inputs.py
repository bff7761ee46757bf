"""PromptInputs: a step's numbers on their way to a GPU that fetches them itself, as the first thing in its graph.

Enters: numbers of steps. Leaves: the same on the device. A copy before the graph would be three calls of the driver,
which take a tenth of a millisecond where they come once in ten.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from flexmoe.engine.numbers import Ints
from flexmoe.errors import EngineError

BUFFERS = 3  # of one step that runs, one that waits behind it, one that is being written
_PATIENCE = 10.0  # seconds for the step two before to begin: it is over when this one is written, or nearly so


class PromptInputs:
    """Room for the numbers of a step, on the device, and buffers of the host that take turns.

    device: int32 [size].
    """

    def __init__(self, size: int, known: int, device: torch.device) -> None:
        """known: how many tokens at most the device may know better than the host."""
        from flexmoe.kernels.triton import fetch  # imports triton, which a start on a CPU need not wait for

        pinned = device.type == "cuda"
        self._fetch, self._head, self._turns = fetch.fetch, fetch.HEAD, fetch.TURNS
        room = -(-(fetch.HEAD + max(size, fetch.LEAST)) // 16) * 16
        self._host = torch.zeros(BUFFERS, room, dtype=torch.int32, pin_memory=pinned)
        self._fetched = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
        self._numbers, self._seen = self._host.numpy(), self._fetched.numpy()
        self._turn = 0  # launches that fetch, modulo TURNS; the device counts, too
        self._turn_there = torch.zeros(1, dtype=torch.int32, device=device)
        self._known = torch.zeros(known, dtype=torch.int64, device=device)
        self.device = torch.zeros(size, dtype=torch.int32, device=device)

    def write(self, numbers: Ints, known: Tensor | None = None) -> None:
        """The numbers that the next launch fetches. known: int64, of the first ones, where not negative, instead."""
        self._wait()
        buffer, head = self._numbers[self._turn % BUFFERS], self._head
        buffer[head : head + len(numbers)] = numbers
        buffer[0], buffer[1] = len(numbers), 0
        if known is not None:
            buffer[1] = len(known)
            self._known[: len(known)].copy_(known)

    def fetch(self) -> None:
        """Launch what brings them to the device; may be part of a graph."""
        self._fetch(self._host, self._fetched, self._turn_there, self._known, self.device)

    def launched(self) -> None:
        """A launch that fetches has been made."""
        self._turn = (self._turn + 1) % self._turns

    def forget(self) -> None:
        """A launch went wrong, and nobody knows whether it fetched: begin anew, when the device is through."""
        if self.device.is_cuda:
            torch.cuda.synchronize(self.device.device)
        self._turn_there.zero_()
        self._turn = self._seen[0] = 0

    def _wait(self) -> None:
        """Until the buffer whose turn it is has been read."""
        end = 0.0
        while (self._turn - int(self._seen[0])) % self._turns >= BUFFERS:
            now = time.monotonic()
            end = end or now + _PATIENCE
            if now > end:
                torch.cuda.synchronize(self.device.device)  # raises what went wrong there
                raise EngineError(
                    "the GPU has not fetched the numbers of a step that it was given; restart the engine."
                )
            time.sleep(20e-6)
