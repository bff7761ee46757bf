"""Beats: numbers that ranks count up in memory which their supervisor reads, so that a hang can be told from work.

Each rank has two: WORK grows with every collective it begins (and to the milestones of comm.Traffic, so that ranks
compare), LIFE twice a second while its process runs at all.

The file has no name, so that it goes with the last process that maps it, whoever of them is killed, and when.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

WORK, LIFE = 0, 1
_PER_RANK = 2
_BYTES = 8


class Beats:
    """The counters of all ranks, in a file that their processes map. file: its descriptor, which stays the caller's."""

    def __init__(self, file: int, size: int) -> None:
        self._cells = memoryview(mmap.mmap(file, size * _PER_RANK * _BYTES)).cast("Q")
        self.size = size

    @staticmethod
    @contextmanager
    def file(size: int) -> Iterator[int]:
        """The descriptor of a new file for the counters of so many ranks, all 0, while processes are given it."""
        with tempfile.TemporaryFile() as made:
            made.truncate(size * _PER_RANK * _BYTES)
            yield made.fileno()

    def of(self, rank: int) -> memoryview:
        """The two counters of a rank, to be counted up."""
        return self._cells[rank * _PER_RANK : (rank + 1) * _PER_RANK]

    def read(self, kind: int) -> list[int]:
        """One counter of every rank."""
        return [self._cells[rank * _PER_RANK + kind] for rank in range(self.size)]
