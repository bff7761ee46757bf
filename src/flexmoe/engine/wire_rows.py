"""Requests and decodes as a rank of another process sees them. Enters: numbers that came over the wire. Leaves: chunks.

A step of hundreds of decodes is launched from its arrays: an object for each row and a list for each table would take a
rank as long as its device needs for the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsIndex, overload

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


@dataclass(frozen=True, slots=True)
class WireChunks:
    """N chunks: their tokens and blocks one after the other, and the counts of each. starts: of each its first token's
    number. tokens: 0 where the host does not know it yet.
    """

    starts: Ints
    num_tokens: Ints
    num_blocks: Ints
    samples: list[bool]
    contiguous: list[bool]
    tokens: Ints
    blocks: Ints

    def __len__(self) -> int:
        return len(self.starts)

    def as_chunks(self) -> list[ScheduledChunk]:
        """Each with a request of its own."""
        tokens, blocks = self.tokens.tolist(), self.blocks.tolist()
        chunks, token, block = [], 0, 0
        for start, num_tokens, num_blocks, samples, contiguous in zip(
            self.starts.tolist(), self.num_tokens.tolist(), self.num_blocks.tolist(), self.samples, self.contiguous,
            strict=True,
        ):  # fmt: skip
            own_tokens, own_blocks = tokens[token : token + num_tokens], blocks[block : block + num_blocks]
            request = WireRequest(start, own_tokens, own_blocks, contiguous)
            chunks.append(ScheduledChunk(request, start, num_tokens, samples))
            token, block = token + num_tokens, block + num_blocks
        return chunks


class WireDecodes(Sequence[ScheduledChunk]):
    """Decodes as arrays, for who takes all at once; and as chunks, made for who asks for one."""

    def __init__(self, arrays: WireChunks) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    @overload
    def __getitem__(self, place: int) -> ScheduledChunk: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ScheduledChunk]: ...
    def __getitem__(self, place: int | slice) -> ScheduledChunk | Sequence[ScheduledChunk]:
        return self._chunks[place]

    @cached_property
    def _chunks(self) -> list[ScheduledChunk]:
        return self.arrays.as_chunks()


def starts_of(chunks: Sequence[ScheduledChunk]) -> Ints | list[int]:
    """The number of each one's first token."""
    return chunks.arrays.starts if isinstance(chunks, WireDecodes) else [chunk.start for chunk in chunks]


def furthest_start(chunks: Sequence[ScheduledChunk]) -> int:
    """The largest of them; 0 if there are none."""
    if isinstance(chunks, WireDecodes):
        return int(chunks.arrays.starts.max(initial=0))
    return max((chunk.start for chunk in chunks), default=0)
