"""Numbers that a device fetches itself: as they were when their launch was made, however late that computes."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from flexmoe.engine import prompt_inputs
from flexmoe.engine.prompt_inputs import BUFFERS, PromptInputs
from flexmoe.errors import EngineError
from flexmoe.kernels.triton import fetch as fetches
from tests.kernels.support import DEVICE


def numbers(seed: int, count: int) -> Any:
    return np.random.default_rng(seed).integers(0, 2**31, count, dtype=np.int32)


def test_they_arrive_whatever_lay_there_before() -> None:
    inputs = PromptInputs(10_000, 4, DEVICE)
    for turn, count in enumerate((9_000, 3, 4_096, 4_097, 10_000, 1, 0)):
        given = numbers(turn, count)
        inputs.write(given)
        inputs.fetch()
        inputs.launched()
        assert inputs.numbers[:count].tolist() == given.tolist()


def test_the_device_knows_some_of_the_first_ones_better() -> None:
    inputs, given = PromptInputs(8, 4, DEVICE), numbers(0, 8)
    for known in (torch.tensor([-1, 7, 0, -1], device=DEVICE), torch.tensor([5], device=DEVICE), None):
        inputs.write(given, known)
        inputs.fetch()
        inputs.launched()
        expected = given.tolist()
        for place, token in enumerate([] if known is None else known.tolist()):
            expected[place] = token if token >= 0 else expected[place]
        assert inputs.numbers.tolist() == expected


def late(inputs: PromptInputs, monkeypatch: pytest.MonkeyPatch) -> deque[Any]:
    """From now on fetches wait until somebody makes them."""
    waiting: deque[Any] = deque()
    fetch = inputs._fetch
    monkeypatch.setattr(inputs, "_fetch", lambda *given: waiting.append(lambda: fetch(*given)))
    return waiting


def test_a_buffer_is_left_alone_until_it_was_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = PromptInputs(64, 1, DEVICE)
    waiting, found = late(inputs, monkeypatch), []
    # Whoever waits for a buffer lets the device go on by one launch.
    monkeypatch.setattr(prompt_inputs.time, "sleep", lambda _: step())

    def step() -> None:
        if waiting:
            waiting.popleft()()
            found.append(inputs.numbers.tolist())

    given = [numbers(seed, 64) for seed in range(11)]
    for each in given:
        inputs.write(each)
        inputs.fetch()
        inputs.launched()
        assert len(waiting) <= BUFFERS
    while waiting:
        step()
    assert found == [each.tolist() for each in given]


def test_counting_begins_again_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = PromptInputs(4, 1, DEVICE)
    inputs._turn = inputs._seen[0] = fetches.TURNS - 2
    inputs._turn_there.fill_(fetches.TURNS - 2)
    for seed in range(5):
        inputs.write(numbers(seed, 4))
        inputs.fetch()
        inputs.launched()
        assert inputs.numbers.tolist() == numbers(seed, 4).tolist()
    assert inputs._turn == int(inputs._seen[0]) == int(inputs._turn_there) == 3


@pytest.mark.parametrize("fetched", [False, True])
def test_a_launch_that_nobody_counted_leaves_nothing(fetched: bool) -> None:
    """Ctrl-C, or an error, came before it or behind it."""
    inputs = PromptInputs(4, 1, DEVICE)
    for turn in range(7):
        inputs.write(numbers(turn, 4))
        if fetched:
            inputs.fetch()
        inputs.write(numbers(turn + 1, 4))
        inputs.fetch()
        inputs.launched()
        assert inputs.numbers.tolist() == numbers(turn + 1, 4).tolist()


def test_a_device_that_never_fetches_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = PromptInputs(4, 1, DEVICE)
    late(inputs, monkeypatch)
    monkeypatch.setattr(prompt_inputs, "_PATIENCE", 0.01)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    for seed in range(BUFFERS):
        inputs.write(numbers(seed, 4))
        inputs.fetch()
        inputs.launched()
    with pytest.raises(EngineError, match="has not fetched"):
        inputs.write(numbers(9, 4))


def test_ctrl_c_may_come_while_it_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = PromptInputs(4, 1, DEVICE)
    inputs.write(numbers(0, 4))
    inputs.fetch()

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs._turn_there, "zero_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inputs.write(numbers(1, 4))
    monkeypatch.undo()
    inputs.write(numbers(2, 4))
    inputs.fetch()
    inputs.launched()
    assert inputs.numbers.tolist() == numbers(2, 4).tolist()
    assert inputs._turn == int(inputs._seen[0]) == int(inputs._turn_there) == 1


def test_a_device_that_is_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = PromptInputs(4, 1, DEVICE)
    waiting = late(inputs, monkeypatch)
    monkeypatch.setattr(prompt_inputs, "_PATIENCE", 0.01)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: [waiting.popleft()() for _ in range(len(waiting))])
    for seed in range(BUFFERS + 1):
        inputs.write(numbers(seed, 4))
        inputs.fetch()
        inputs.launched()
    assert len(waiting) == 1
    waiting.popleft()()
    assert inputs.numbers.tolist() == numbers(BUFFERS, 4).tolist()


def test_buffers_that_cannot_be_counted_or_are_too_small_are_refused() -> None:
    some = torch.zeros(1, dtype=torch.int32)
    for buffers, size in ((5, 8192), (2, 8193), (2, 4096)):
        with pytest.raises(ValueError, match=f"{buffers} buffers of {size} numbers"):
            fetches.fetch(torch.zeros(buffers, size, dtype=torch.int32), some, some, some.long(), some)
