"""Pipeline: the stages of a model in a row. Enters: rows of the stage before. Leaves: rows for the stage behind.

Each stage computes its layers for all rows of a step and hands the hidden states on, point to point: a rank to the
rank that has its place in the next stage. One step is in the pipeline at a time.

A supervisor finds out who hangs by comparing what the ranks have begun, and stages begin different things. So each
step has milestones, in the order in which work goes: stage 0 begins, its rows go to stage 1, ..., the step is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from flexmoe.parallel.comm import Group


class Pipeline:
    """A rank's place in its row of stages. group: the ranks of all stages that have this one's place there."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @property
    def is_first(self) -> bool:
        return self._group.index == 0

    @property
    def is_last(self) -> bool:
        return self._group.index == self._group.size - 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around all that a rank does for one step."""
        traffic, start = self._group.traffic, self._group.traffic.milestone
        traffic.reach(start + self._group.index)
        try:
            yield
        finally:
            traffic.reach(start + self._group.size)

    def receive(self, x: Tensor) -> Tensor:
        """Fill x [T, H] with what the stage before computed."""
        return self._group.receive(x, self._group.index - 1, "stage")

    def hand_on(self, x: Tensor) -> None:
        """Give x [T, H] to the stage behind."""
        self._group.traffic.reach(self._group.traffic.milestone + 1)
        self._group.send(x, self._group.index + 1, "stage")
