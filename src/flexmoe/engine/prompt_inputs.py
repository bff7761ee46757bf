"""PromptInputs: a step's numbers on their way to a GPU that fetches them itself, as the first thing in its graph.

Enters: numbers of steps. Leaves: the same on the device. A copy before the graph would be three calls of the driver,
which take a tenth of a millisecond where they come once in ten milliseconds.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from flexmoe.engine.host_buffers import BUFFERS
from flexmoe.engine.numbers import Ints
from flexmoe.errors import EngineError

_PATIENCE = 10.0  # seconds until the device is asked what it is at, if the step three before has not begun


class PromptInputs:
    """Room for the numbers of a step, on the device, and buffers of the host that take turns.

    numbers: int32 [size], where the device has them. Each `write` is followed by one launch that fetches, and then by
    `launched`; what comes in between those, Ctrl-C or an error, makes the next `write` begin anew.
    """

    def __init__(self, size: int, known: int, device: torch.device) -> None:
        """known: how many tokens at most the device may know better than the host."""
        from flexmoe.kernels.triton import fetch  # imports triton, which a start on a CPU need not wait for

        pinned = device.type == "cuda"
        self._fetch, self._head, self._turns = fetch.fetch, fetch.HEAD, fetch.TURNS
        room = -(-(fetch.HEAD + max(size, fetch.LEAST)) // 16) * 16
        self._host = torch.zeros(BUFFERS, room, dtype=torch.int32, pin_memory=pinned)
        self._fetched = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
        self._buffers, self._seen = self._host.numpy(), self._fetched.numpy()
        self._turn = 0  # launches that fetch, modulo TURNS; the device counts, too
        self._unsure = False  # whether the device may have counted what the host has not
        self._turn_there = torch.zeros(1, dtype=torch.int32, device=device)
        self._known = torch.zeros(known, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(size, dtype=torch.int32, device=device)

    def write(self, numbers: Ints, known: Tensor | None = None) -> None:
        """The numbers that the next launch fetches. known: int64, of the first ones, where not negative, instead."""
        if self._unsure:
            self._begin_anew()
        self._unsure = True
        self._wait()
        buffer, head = self._buffers[self._turn % BUFFERS], self._head
        buffer[head : head + len(numbers)] = numbers
        buffer[0], buffer[1] = len(numbers), 0
        if known is not None:
            buffer[1] = len(known)
            self._known[: len(known)].copy_(known)

    def fetch(self) -> None:
        """Launch what brings them to the device; may be part of a graph."""
        self._fetch(self._host, self._fetched, self._turn_there, self._known, self.numbers)

    def launched(self) -> None:
        """A launch that fetches has been made."""
        self._turn = (self._turn + 1) % self._turns
        self._unsure = False

    def _begin_anew(self) -> None:
        """Count from 0 on both sides, when the device is through."""
        if self.numbers.is_cuda:
            torch.cuda.synchronize(self.numbers.device)
        self._turn_there.zero_()
        self._turn = self._seen[0] = 0
        self._unsure = False

    def _wait(self) -> None:
        """Until the buffer whose turn it is has been read."""
        end = 0.0
        while self._is_full():
            now = time.monotonic()
            end = end or now + _PATIENCE
            if now > end:
                torch.cuda.synchronize(self.numbers.device)  # raises what went wrong there
                if self._is_full():
                    raise EngineError("the GPU has not fetched the numbers of a step that it is through with.")
            time.sleep(20e-6)

    def _is_full(self) -> bool:
        return (self._turn - int(self._seen[0])) % self._turns >= BUFFERS
