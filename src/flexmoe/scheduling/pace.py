"""Pace: how large a chunk of prompts may be beside decodes that somebody watches. Enters: times. Leaves: tokens.

A step is as long as its decodes take alone, and what its prompts add. Both are learnt from the steps of this run: the
median of the latest ones with about as many decodes, and with about as many prompt tokens. Chunks have one of a few
sizes, 1, 1.5, 2, 3, 4, 6 ... times the least, so that each is seen often. Before a size was seen it is taken to cost no
more than a larger one that was; and as much as a smaller one up to the balance point of the roofline, which is twice
the least, from there on in proportion. Where the roofline is wrong, that is seen at the first step of that size.

What is allowed is the largest size that is expected to keep a step within `slowdown` times its decodes alone; it is
never less than the smallest size, so that prompts advance at whatever cost. Times decide about sizes only, never about
the order of requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from flexmoe.scheduling.roofline import StepTokens

_REMEMBERED = 9  # steps of a kind: enough to forget one that captured a graph, few enough to follow a change


class Pace:
    """What steps took, and what that allows."""

    def __init__(self, tokens: StepTokens, slowdown: float) -> None:
        """tokens: the range of sizes. slowdown: a step with prompts over one without."""
        self._slowdown = slowdown
        self._flat = 2 * tokens.least  # tokens up to which reading the weights is what takes time
        self._sizes = _sizes(tokens)
        self._decodes: dict[int, deque[float]] = {}  # seconds, by the number of bits of the number of decodes
        self._prompts: dict[int, deque[float]] = {}  # seconds added, by place in _sizes

    def observe(self, num_decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step took so long."""
        if prompt_tokens == 0:
            _remember(self._decodes, num_decodes.bit_length(), seconds)
            return
        alone = self._decode_seconds(num_decodes)
        place = bisect_left(self._sizes, prompt_tokens)
        # The tail of a prompt is no example of a whole chunk: it would make the smallest size look cheap.
        if alone is not None and place < len(self._sizes) and prompt_tokens > 0.8 * self._sizes[place]:
            _remember(self._prompts, place, max(0.0, seconds - alone))

    def limit(self, num_decodes: int) -> int:
        """Prompt tokens that may stand beside so many decodes."""
        alone = self._decode_seconds(num_decodes)
        if alone is None:
            return self._sizes[0]
        allowed = (self._slowdown - 1) * alone
        fitting = [size for place, size in enumerate(self._sizes) if self._added(place) <= allowed]
        return max(fitting, default=self._sizes[0])

    def _decode_seconds(self, count: int) -> float | None:
        """0 for none. Of a number not seen yet, what fewer took, which is less; else what more took."""
        if count == 0:
            return 0.0
        bits = count.bit_length()
        known = sorted(self._decodes, key=lambda other: (other > bits, abs(other - bits)))
        return _median(self._decodes[known[0]]) if known else None

    def _added(self, place: int) -> float:
        """Seconds that a chunk of this size is expected to add; infinite if nothing is known."""
        if place in self._prompts:
            return _median(self._prompts[place])
        smaller = max((other for other in self._prompts if other < place), default=None)
        larger = min((other for other in self._prompts if other > place), default=None)
        bounds = [] if larger is None else [_median(self._prompts[larger])]
        if smaller is not None:
            more = max(self._sizes[place], self._flat) / max(self._sizes[smaller], self._flat)
            bounds.append(_median(self._prompts[smaller]) * more)
        return min(bounds, default=float("inf"))


def _sizes(tokens: StepTokens) -> list[int]:
    """From `least` to `most`: 1, 1.5, 2, 3, 4, 6 ... times least."""
    sizes, size = [], tokens.least
    while size < tokens.most:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [size for size in sizes if size < tokens.most] + [tokens.most]


def _remember(kept: dict[int, deque[float]], key: int, seconds: float) -> None:
    kept.setdefault(key, deque(maxlen=_REMEMBERED)).append(seconds)


def _median(seconds: deque[float]) -> float:
    """Of an even number the lower one: a first step of its kind may have compiled something."""
    return sorted(seconds)[(len(seconds) - 1) // 2]
