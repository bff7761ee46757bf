"""What the operations of a decode step take in the C kernels. Enters: a ModelConfig, rows, contexts. Leaves: seconds.

The kernels compute a step part by part: attention with its projections, feed-forward, head. Attention proper is what a
long context takes more than one of a single key, of runs in turns, lest what else the machine does counts as attention;
it is below 0 if it is lost in noise all the same. Layers rotate, so that weights come from memory. The median of some
runs counts: a step has no better luck, where other programs share the memory. The head is that of greedy steps, which
read less of it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.kernels.cpu.decode import PagedRows, Part
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.loader import fill_dummy

_BLOCK = 16
_FEWEST, _MOST, _SECONDS = 5, 150, 0.05


class NativeLayers:
    """Some layers in the C kernels."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, threads: int) -> None:
        self.config, self.dtype = config, dtype
        model = Decoder(config, ParallelPlan(), "cpu", 2**15, dtype=dtype, device=torch.device("cpu")).eval()
        model.move_to_large_pages()
        fill_dummy({name: p.data for name, p in model.named_parameters()}, 0, dtype)
        model.pack(threads)
        assert model.native is not None
        self._native = model.native
        self._layers = itertools.cycle(range(config.num_layers))

    @property
    def most_rows(self) -> int:
        """Rows that the engine gives these kernels."""
        return self._native.max_rows

    def step(self, rows: int, context: int) -> dict[str, float]:
        """Seconds of "projections", "attention" and "feed" of a layer, and of "head"."""
        projections, attention = self._attend(rows, context)
        return {
            "projections": projections, "attention": attention,
            "feed": self._seconds(Part.FEED, rows, context), "head": self._seconds(Part.BEST, rows, 1),
        }  # fmt: skip

    def whole(self, rows: int, context: int) -> float:
        """Of a greedy step with all its layers and the head."""
        return self._seconds(Part.GREEDY, rows, context)

    def attention(self, rows: int, context: int) -> float:
        """Of a layer, projections apart."""
        return self._attend(rows, context)[1]

    def _attend(self, rows: int, context: int) -> tuple[float, float]:
        """Seconds of the projections, and of attention proper."""
        short, long = self._timed(Part.ATTEND, rows, 1), self._timed(Part.ATTEND, rows, context)
        took = [(next(short), next(long)) for _ in _turns(2 * _SECONDS)]
        return statistics.median(a for a, _ in took), statistics.median(b - a for a, b in took)

    def _seconds(self, part: Part, rows: int, context: int) -> float:
        timed = self._timed(part, rows, context)
        return statistics.median(next(timed) for _ in _turns(_SECONDS))

    def _timed(self, part: Part, rows: int, context: int) -> Iterator[float]:
        """Seconds of one run after another, layer by layer."""
        blocks = -(-context // _BLOCK)
        cache = KVCache(self.config, rows * blocks, _BLOCK, self.dtype, torch.device("cpu"))
        for kept in cache.layers:
            kept.normal_()
        tables = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
        tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, rows)
        lengths = np.full(rows, context, dtype=np.int32)
        paged = PagedRows(tokens.astype(np.int64), tables, lengths, np.arange(rows), _BLOCK)
        run = self._native.parts(paged, cache)
        run(Part.EMBED, 0)
        while True:
            layer = next(self._layers)
            start = time.perf_counter()
            run(part, None if part is Part.GREEDY else layer)
            yield time.perf_counter() - start


def _turns(seconds: float) -> Iterator[int]:
    """As many as fit into the time, within bounds."""
    end = time.perf_counter() + seconds
    for number in range(_MOST):
        if number >= _FEWEST and time.perf_counter() >= end:
            return
        yield number
