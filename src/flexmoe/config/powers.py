"""Powers of two, to which numbers of rows are padded, so that few graphs and kernels serve all. No torch."""

from __future__ import annotations


def power_of_two(number: int) -> int:
    """The least one that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
