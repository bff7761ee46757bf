"""FreeSpace: which blocks hold nothing, and which of them to take next. Enters and leaves: block numbers.

Attention on a CPU reads the keys of a request as one view if its blocks lie side by side. So a new request is
put where it can grow in place: it *claims* the blocks behind its own up to its longest possible length. A claim
is a wish: others keep clear of it while they find blocks elsewhere, and take from it when they do not.
"""

from __future__ import annotations

from collections.abc import Sequence


class FreeSpace:
    """The blocks without content, as flags: a C-speed search replaces lists of free runs."""

    __slots__ = ("_blank", "_unclaimed", "num_blank")

    def __init__(self, num_blocks: int) -> None:
        self._blank = bytearray(b"\1") * num_blocks
        self._unclaimed = bytearray(self._blank)  # blank, and in nobody's claim
        self.num_blank = num_blocks

    def __contains__(self, block: int) -> bool:
        return 0 <= block < len(self._blank) and self._blank[block] == 1

    def put(self, blocks: Sequence[int]) -> None:
        """Take back blocks whose content is worthless."""
        blank, unclaimed = self._blank, self._unclaimed
        for block in blocks:
            assert not blank[block], f"block {block} is freed twice"
            blank[block] = unclaimed[block] = 1
            self.num_blank += 1

    def take_after(self, last: int) -> int:
        """One block: the one behind `last` if that is blank, else the lowest. At least one must be blank."""
        block = last + 1 if last + 1 in self else self._lowest()
        self._mark_taken(block, 1)
        return block

    def take_many(self, count: int, last: int | None, room: int) -> list[int]:
        """`count` blocks, side by side if that is possible. At least so many must be blank.

        last: the block they should follow, None if they may lie anywhere.
        room: blocks wanted blank behind them.
        """
        start = self._find_run(count, room) if last is None else self._run_after(last, count)
        if start >= 0:
            self._mark_taken(start, count)
            return list(range(start, start + count))
        scattered = []
        for _ in range(count):
            scattered.append(self._lowest())
            self._mark_taken(scattered[-1], 1)
        return scattered

    def has_run(self, length: int) -> bool:
        """Are so many blocks in a row blank, and in nobody's claim?"""
        return self._unclaimed.find(b"\1" * length) >= 0

    def claim(self, start: int, stop: int) -> None:
        """Ask others to keep clear of the blocks from start to stop."""
        stop = min(stop, len(self._blank))
        if start < stop:
            self._unclaimed[start:stop] = bytes(stop - start)

    def unclaim(self, start: int, stop: int) -> None:
        """Withdraw a claim. Where claims overlapped the other goes too: a wish is lost, nothing else."""
        self._unclaimed[start:stop] = self._blank[start:stop]

    def check_integrity(self) -> None:
        blank, unclaimed = self._blank, self._unclaimed
        if sum(blank) != self.num_blank:
            raise AssertionError(f"{sum(blank)} blocks are blank, but {self.num_blank} were counted")
        if len(blank) != len(unclaimed) or any(u > b for u, b in zip(unclaimed, blank, strict=True)):
            raise AssertionError("a block that is not blank is offered as unclaimed")

    def _mark_taken(self, start: int, count: int) -> None:
        self._blank[start : start + count] = self._unclaimed[start : start + count] = bytes(count)
        self.num_blank -= count

    def _lowest(self) -> int:
        block = self._unclaimed.find(1)
        return block if block >= 0 else self._blank.find(1)

    def _run_after(self, last: int, count: int) -> int:
        return last + 1 if self._blank.startswith(b"\1" * count, last + 1) else -1

    def _find_run(self, count: int, room: int) -> int:
        """First of `count` blank blocks in a row: with room, else clear of claims, else anywhere, else -1."""
        start = self._unclaimed.find(b"\1" * (count + room))
        if start < 0:
            start = self._unclaimed.find(b"\1" * count)
        return start if start >= 0 else self._blank.find(b"\1" * count)
