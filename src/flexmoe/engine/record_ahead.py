"""Graphs that requests will need, recorded while there are none. Enters: what was started. Leaves: graphs.

When a step comes in a form that is new, its graph is recorded: kernels are loaded and launched once by one, and all
streams wait for that, some tenths of a second. A server that has nothing to do records those of the usual forms, one
at a time, so that a request that comes meanwhile waits for one at most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, product

import torch

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.cuda_graph import GraphedDecoder, buckets_up_to
from flexmoe.engine.device import computing_on
from flexmoe.engine.prompt_graphs import GraphedPrompts
from flexmoe.engine.ranks import StartedRanks
from flexmoe.engine.sampler import Sampler, SamplingState
from flexmoe.engine.startup import Started
from flexmoe.scheduling.prompt_forms import MOST_CHUNKS, forms_up_to

_log = logging.getLogger(__name__)

_FEW, _MANY = 8, 64  # decodes that come first, and the most that are recorded ahead
_PROMPTS = (1, 2, 4)  # chunks of a step
_WITH_DECODES = (8, 16, 32, MOST_CHUNKS)  # the same where each decode beside them is one, too
_SPARE = 2 << 30  # bytes of memory that stay free
_WAYS = (SamplingParams(temperature=0), SamplingParams(seed=0), SamplingParams(top_p=0.9, seed=0))


class RecordingAhead:
    """Records one graph after another. Nothing else may use the device meanwhile."""

    def __init__(
        self, started: Started | StartedRanks, tokens: int, *, wanted: bool, one_pass: bool = False
    ) -> None:  # fmt: skip
        """tokens: of a step, at most. Records nothing if not wanted, on several ranks, or without graphs.

        one_pass: decodes beside prompts are chunks of the same graph.
        """
        self._left: Iterator[Callable[[], None]] = iter(())
        if wanted and isinstance(started, Started) and started.graphed is not None:
            self._device = started.device
            self._left = _recordings(started.graphed, started.prompts, tokens, _WITH_DECODES if one_pass else ())

    def record(self) -> bool:
        """The next graph. False: all are there, or there is no memory for more."""
        if (recording := next(self._left, None)) is None:
            return False
        with computing_on(self._device):
            free, _ = torch.cuda.mem_get_info()
            if free < _SPARE:
                return self._stop(f"{free} bytes of memory are free")
            try:
                recording()
            except torch.OutOfMemoryError as error:  # nobody has asked for it yet: no reason to end
                return self._stop(str(error))
            torch.cuda.synchronize()
        return True

    def _stop(self, reason: str) -> bool:
        """Record no more."""
        _log.debug("graphs are no longer recorded ahead: %s", reason)
        self._left = iter(())
        return False


def _recordings(
    decodes: GraphedDecoder, prompts: GraphedPrompts | None, tokens: int, with_decodes: Sequence[int]
) -> Iterator[Callable[[], None]]:
    """The likeliest first: few streams, one prompt, then more of both, then streams that look far back.

    with_decodes: chunks of steps of prompts and streams together.
    """
    rows = buckets_up_to(min(decodes.max_rows, _MANY))
    few, many = [count for count in rows if count <= _FEW], [count for count in rows if count > _FEW]

    def forms(chunks: Sequence[int]) -> Iterator[Callable[[], None]]:
        if prompts is not None:
            yield from (partial(_prompt, *form, prompts) for form in forms_up_to(tokens, chunks))

    return chain(
        (partial(_decode, decodes, *each) for each in product(few, _WAYS, (False,))),
        forms(_PROMPTS),
        (partial(_decode, decodes, *each) for each in product(many, _WAYS, (False,))),
        forms(with_decodes),
        (partial(_decode, decodes, *each) for each in product(rows, _WAYS, (True,))),
    )


def _decode(decodes: GraphedDecoder, rows: int, params: SamplingParams, long: bool) -> None:
    decodes.record([SamplingState(params, 0)] * rows, long=long)


def _prompt(tokens: int, chunks: int, prompts: GraphedPrompts) -> None:
    logits = prompts.record(tokens, chunks)
    for params in _WAYS:  # drawn tokens are chosen by torch, whose kernels are loaded when they are first launched
        Sampler().choose(logits, [SamplingState(params, 0)] * len(logits))
