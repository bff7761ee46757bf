"""Requests and decodes as a rank of another process sees them. Enters: numbers that came over the wire. Leaves: chunks.

A step of hundreds of decodes is launched from its arrays: an object for each row and a list for each table would take a
rank as long as its device needs for the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, SupportsIndex, overload

import numpy as np

from flexmoe.engine.numbers import Ints
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk


class _Tail:
    """The tokens from number `start` on, under the numbers they have in the whole sequence."""

    __slots__ = ("_start", "_tokens")

    def __init__(self, start: int, tokens: list[int]) -> None:
        self._start, self._tokens = start, tokens

    def __len__(self) -> int:
        return self._start + len(self._tokens)

    def __getitem__(self, place: slice | SupportsIndex) -> Any:
        if isinstance(place, slice):
            start, stop, _ = place.indices(len(self))
            assert start >= self._start, "a token that was not sent"
            return self._tokens[start - self._start : stop - self._start]
        index = int(place)
        return self._tokens[index if index < 0 else index - self._start]


class WireRequest(Request):
    """Of a request what a forward pass reads."""

    __slots__ = ()

    def __init__(self, start: int, tokens: list[int], blocks: list[int], contiguous: bool) -> None:
        self.token_ids = _Tail(start, tokens)  # type: ignore[assignment]
        self.blocks, self.contiguous = blocks, contiguous


class DecodeRows(Sequence[ScheduledChunk]):
    """Decodes as arrays, int32, a number for each; and as chunks, made for those who ask.

    starts: of each its token's number. tokens: 0 where the host does not know it yet. num_blocks, and blocks: all
    tables, one after the other.
    """

    def __init__(
        self, starts: Ints, tokens: Ints, num_blocks: Ints, blocks: Ints, samples: Sequence[bool],
        contiguous: Sequence[bool],
    ) -> None:  # fmt: skip
        self.starts, self.tokens, self.num_blocks, self.blocks = starts, tokens, num_blocks, blocks
        self._flags = samples, contiguous

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, place: int) -> ScheduledChunk: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ScheduledChunk]: ...
    def __getitem__(self, place: int | slice) -> ScheduledChunk | Sequence[ScheduledChunk]:
        return self._chunks[place]

    @cached_property
    def _chunks(self) -> list[ScheduledChunk]:
        each = np.ones_like(self.starts)
        return chunks_of(self.starts, each, self.num_blocks, self.tokens, self.blocks, *self._flags)


def chunks_of(
    starts: Ints, num_tokens: Ints, num_blocks: Ints, tokens: Ints, blocks: Ints, samples: Sequence[bool],
    contiguous: Sequence[bool],
) -> list[ScheduledChunk]:  # fmt: skip
    """Chunks, each with a request of its own. tokens, blocks: of all, one after the other."""
    all_tokens, all_blocks = tokens.tolist(), blocks.tolist()
    chunks, token, block = [], 0, 0
    for start, count, table, samples_, whole in zip(
        starts.tolist(), num_tokens.tolist(), num_blocks.tolist(), samples, contiguous, strict=True
    ):
        own_tokens, own_blocks = all_tokens[token : token + count], all_blocks[block : block + table]
        chunks.append(ScheduledChunk(WireRequest(start, own_tokens, own_blocks, whole), start, count, samples_))
        token, block = token + count, block + table
    return chunks


def starts_of(chunks: Sequence[ScheduledChunk]) -> Ints | list[int]:
    """The number of each one's first token."""
    return chunks.starts if isinstance(chunks, DecodeRows) else [chunk.start for chunk in chunks]
