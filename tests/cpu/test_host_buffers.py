"""Buffers on the host that take turns: what is on its way to the device is not written over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexmoe.engine.host_buffers import BUFFERS, HostBuffers

CPU = torch.device("cpu")


class Copies:
    """In the place of an event: whether the copy before it is over. The host waits for it, if it waits at all."""

    def __init__(self) -> None:
        self.under_way = False

    def record(self) -> None:
        self.under_way = True

    def synchronize(self) -> None:
        self.under_way = False


def test_a_buffer_that_is_taken_is_not_on_its_way() -> None:
    buffers: Any = HostBuffers(4, torch.int32, CPU)
    buffers._sent = copies = [Copies() for _ in range(BUFFERS)]
    device = torch.zeros(6, dtype=torch.int32)
    for step in range(3 * BUFFERS):
        turn = buffers.take()
        assert not copies[turn].under_way
        assert [copy.under_way for copy in copies].count(True) == min(step, BUFFERS - 1)
        buffers.all[turn][:3] = step
        buffers.send(device, 3)
        assert copies[turn].under_way
        assert device.tolist() == [step] * 3 + [0] * 3


def test_a_step_that_was_cut_short_leaves_the_others_alone() -> None:
    """It took a buffer and sent nothing; what was sent before is still on its way."""
    buffers: Any = HostBuffers(1, torch.int32, CPU)
    buffers._sent = copies = [Copies() for _ in range(BUFFERS)]
    sent = buffers.take()
    buffers.send(torch.zeros(1, dtype=torch.int32), 1)
    turns = [buffers.take() for _ in range(BUFFERS - 1)]
    assert sent not in turns
    assert copies[sent].under_way


@pytest.mark.parametrize("size", [0, 5])
def test_buffers_have_one_size(size: int) -> None:
    assert [len(buffer) for buffer in HostBuffers(size, torch.uint8, CPU).all] == [size] * BUFFERS
