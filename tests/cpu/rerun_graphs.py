"""In the place of CUDA graphs on a CPU: replaying one does its work again. Enters: work. Leaves: graphs, so to say."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from flexmoe.engine.cuda_graph import Captured
from flexmoe.engine.prompt_inputs import PromptInputs
from flexmoe.parallel.comm import Traffic


class _Rerun:
    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


# What graphs fetch on a CPU they fetch in Triton's interpreter.
NEEDS_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU they run, see tests/gpu"
)

_fetch = PromptInputs.fetch


def _look(inputs: PromptInputs) -> None:
    turn = int(inputs._turn_there)
    _fetch(inputs)
    inputs._turn_there[0] = inputs._seen[0] = turn


class RerunPool:
    """In the place of a GraphPool. captures: how many graphs there are; replays: how often any was used."""

    def __init__(self, device: torch.device, traffic: Traffic | None = None) -> None:
        self._traffic = traffic or Traffic()
        self.captures = self.replays = 0

    def capture(self, work: Callable[[], None]) -> Captured:
        """Does the work, as it is launched while a graph is recorded; what it sends is counted by replays.

        But what it fetches is fetched again by the replay, so that it counts as no turn.
        """
        self.captures += 1
        with self._traffic.aside() as sent, patch.object(PromptInputs, "fetch", _look):
            work()

        def replay() -> None:
            self.replays += 1
            with self._traffic.aside():
                work()

        graph: Any = _Rerun(replay)
        return Captured(graph, sent, self._traffic)
