"""Beats: numbers that ranks count up in memory which their supervisor reads, so that a hang can be told from work.

Each rank has two: WORK grows with every collective it begins (and to the milestones of comm.Traffic, so that ranks
compare), LIFE twice a second while its process runs at all.
"""

from __future__ import annotations

import mmap
from pathlib import Path

WORK, LIFE = 0, 1
_PER_RANK = 2
_BYTES = 8


class Beats:
    """The counters of all ranks, in a file that their processes map."""

    def __init__(self, path: Path, size: int, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(size * _PER_RANK * _BYTES))
        with path.open("r+b") as file:
            self._cells = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self.size = size

    def of(self, rank: int) -> memoryview:
        """The two counters of a rank, to be counted up."""
        return self._cells[rank * _PER_RANK : (rank + 1) * _PER_RANK]

    def read(self, kind: int) -> list[int]:
        """One counter of every rank."""
        return [self._cells[rank * _PER_RANK + kind] for rank in range(self.size)]
