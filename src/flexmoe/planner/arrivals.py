"""When requests are due. Enters: a rate and a seed. Leaves: seconds after the start, in order."""

from __future__ import annotations

import random


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """`count` arrivals, `rate` a second on average, independent of one another: their gaps are exponential.

    Those of a smaller count are the first of a larger one.
    """
    draw = random.Random(f"arrivals {seed}")
    due, now = [], 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        due.append(now)
    return due
