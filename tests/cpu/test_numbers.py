"""Lists of numbers as arrays."""

from __future__ import annotations

import numpy as np
import pytest

from flexmoe.engine.numbers import int32s


@pytest.mark.parametrize("values", [[], [7], [0, 2**31 - 1, 3]])
def test_numbers_are_as_they_were(values: list[int]) -> None:
    array = int32s(values)
    assert array.dtype == np.int32
    assert array.tolist() == values


def test_a_number_below_zero_is_no_place() -> None:
    with pytest.raises(OverflowError):
        int32s([3, -1])
