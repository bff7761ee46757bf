"""From a step's chunks to the rows of a PromptDecoder: one flat buffer of numbers, so that one copy brings them over.

Enters: chunks. Leaves: the buffer, and views of it. What a `PromptForm` has room for beyond the chunks is padding, so
that one CUDA graph serves all steps of a form.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from flexmoe.engine.numbers import Ints, int32s
from flexmoe.kernels.prefill_attention import Spans
from flexmoe.models.device_rows import PromptRows
from flexmoe.scheduling.step import ScheduledChunk

Buffer = TypeVar("Buffer", Tensor, Ints)

_ALIGNED = 4  # numbers of 16 bytes: each part begins at such an address, as compiled kernels expect of all


@dataclass(frozen=True, slots=True)
class PromptForm:
    """Room in a step. rows: tokens. spans: chunks, and samples: those that sample. blocks: of rows, for attention.

    padded: whether any of it may be padding. Such rows have no length and no place in the cache, and belong to an empty
    span; samples that nobody asked for are of the first row.
    """

    rows: int
    spans: int
    samples: int
    blocks: int
    padded: bool = False

    @staticmethod
    def exact(chunks: Sequence[ScheduledChunk], block_rows: int) -> PromptForm:
        """No room but for these chunks."""
        counts = [chunk.num_tokens for chunk in chunks]
        blocks = sum(-(-count // block_rows) for count in counts)
        return PromptForm(sum(counts), len(chunks), sum(chunk.samples for chunk in chunks), blocks)

    @property
    def head(self) -> int:
        """Numbers before the tables."""
        size: int = _places(self)["tables"].start
        return size

    def parts(self, flat: Buffer) -> dict[str, Buffer]:
        """The parts of a buffer of this form, by name. All that is left are the tables."""
        return {name: flat[place] for name, place in _places(self).items()}

    def rows_of(self, flat: Tensor, block_rows: int, block_size: int) -> PromptRows:
        """Views of a buffer of this form."""
        part = self.parts(flat)
        spans, sampled = (
            Spans(part["spans"].view(-1, 4), part["tables"], part[name].view(-1, 2), block_rows, block_size)
            for name in ("blocks", "sample_blocks")
        )
        return PromptRows(
            part["token_ids"], part["positions"], part["slots"], spans, part["sample_rows"], sampled,
            part.get("lengths"),
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _places(form: PromptForm) -> dict[str, slice]:
    """Where each part is, in their order."""
    rows = ["token_ids", "positions", "slots"] + ["lengths"] * form.padded
    sizes = dict.fromkeys(rows, form.rows)
    sizes |= {"sample_rows": form.samples, "spans": 4 * form.spans}
    sizes |= {"blocks": 2 * form.blocks, "sample_blocks": 2 * form.samples}
    places, start = {}, 0
    for name, size in sizes.items():
        places[name] = slice(start, start + size)
        start += -(-size // _ALIGNED) * _ALIGNED
    return places | {"tables": slice(start, None)}


def pack(
    chunks: Sequence[ScheduledChunk], form: PromptForm, block_size: int, block_rows: int, *, pinned: bool
) -> Tensor:
    """The chunks, in their order, as a flat int32 buffer of the form on the host. block_rows: those of attention."""
    flat = torch.empty(form.head + num_tables(chunks), dtype=torch.int32, pin_memory=pinned)
    write(chunks, form.parts(flat.numpy()), block_size, block_rows)
    return flat


def num_tables(chunks: Sequence[ScheduledChunk]) -> int:
    """Numbers in their tables."""
    return sum([len(chunk.request.blocks) for chunk in chunks])


def write(chunks: Sequence[ScheduledChunk], parts: Mapping[str, Ints], block_size: int, block_rows: int) -> None:
    """Write the chunks, in their order, and padding into the parts of a buffer, whose tables may have room left.

    Padding is 0, but for places in the cache, -1, and blocks, of the first empty span. If there are samples of padding,
    which are of row 0, its block is among those of samples.
    """
    tokens: list[int] = []
    tables: list[int] = []
    spans: list[int] = []
    sampled: list[int] = []
    last_blocks: list[int] = []
    for chunk in chunks:
        request = chunk.request
        spans += len(tokens), chunk.num_tokens, chunk.start, len(tables)
        # 0 for a decode whose token only the device knows.
        tokens += request.token_ids[chunk.start : chunk.start + chunk.num_tokens] or (0,)
        tables += request.blocks
        if chunk.samples:
            sampled.append(len(tokens) - 1)
            last_blocks += len(spans) // 4 - 1, (chunk.num_tokens - 1) // block_rows * block_rows
    parts["tables"][: len(tables)] = int32s(tables)
    for name, numbers in ("token_ids", tokens), ("sample_rows", sampled), ("spans", spans):
        parts[name][: len(numbers)] = int32s(numbers)
        parts[name][len(numbers) :] = 0
    _write_rows(parts, len(chunks), len(tokens), block_size)
    if len(sampled) < len(parts["sample_rows"]):
        last_blocks += 0, 0
    for name, blocks in ("blocks", _blocks(spans, block_rows)), ("sample_blocks", last_blocks):
        padding = len(parts[name]) - len(blocks)
        parts[name][:] = int32s(blocks + [len(chunks), 0] * (padding // 2))


def lay_out(chunks: Sequence[ScheduledChunk], block_size: int, block_rows: int, device: torch.device) -> PromptRows:
    """Rows of the chunks alone, without padding."""
    form = PromptForm.exact(chunks, block_rows)
    flat = pack(chunks, form, block_size, block_rows, pinned=device.type == "cuda")
    return form.rows_of(flat.to(device, non_blocking=True), block_rows, block_size)


def _write_rows(parts: Mapping[str, Ints], chunks: int, rows: int, block_size: int) -> None:
    """Where rows stand in their requests and in the cache, from spans and tables."""
    first, counts, starts, table = parts["spans"].reshape(-1, 4)[:chunks].T
    positions = np.arange(rows, dtype=np.int32) + (starts - first).repeat(counts)
    block = positions // block_size
    places = parts["tables"].take(table.repeat(counts) + block)
    parts["positions"][:rows] = positions
    parts["positions"][rows:] = 0
    parts["slots"][:rows] = (places - block) * block_size + positions
    parts["slots"][rows:] = -1
    if "lengths" in parts:
        parts["lengths"][:rows] = positions + 1
        parts["lengths"][rows:] = 0


def _blocks(spans: Sequence[int], block_rows: int) -> list[int]:
    """[2 B], a span and a row in it; those that see most keys first."""
    found = [
        (-start - row, index, row)
        for index, (count, start) in enumerate(zip(spans[1::4], spans[2::4], strict=True))
        for row in range(0, count, block_rows)
    ]
    return [number for _, index, row in sorted(found) for number in (index, row)]
