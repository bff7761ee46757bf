"""From a step's chunks to the rows of a PromptDecoder: one flat buffer of numbers, which is brought over at once.

Enters: chunks. Leaves: the buffer, and views of it. What a `PromptForm` has room for beyond the chunks is padding, so
that one CUDA graph serves all steps of a form.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmoe.engine.device import to_device
from flexmoe.engine.numbers import Ints, int32s
from flexmoe.kernels.prefill_attention import Spans
from flexmoe.models.device_rows import PromptRows
from flexmoe.scheduling.step import ScheduledChunk

_ALIGNED = 4  # numbers of 16 bytes: each part begins at such an address, as compiled kernels expect of all


@dataclass(frozen=True, slots=True)
class PromptForm:
    """Room in a step. rows: tokens. spans: chunks, and samples: those that sample. blocks: of rows, for attention.

    padded: whether any of it may be padding. Such rows belong to no span; samples that nobody asked for are of row 0.
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

    def rows_of(self, flat: Tensor, block_rows: int, block_size: int) -> PromptRows:
        """Views of a buffer of this form."""
        part = {name: flat[place] for name, place in _places(self).items()}
        spans, sampled = (
            Spans(part["spans"].view(-1, 4), part["tables"], part[name].view(-1, 2), block_rows, block_size)
            for name in ("blocks", "sample_blocks")
        )
        return PromptRows(part["token_ids"], spans, part["sample_rows"], sampled, self.padded)


@functools.lru_cache(maxsize=64)
def _places(form: PromptForm) -> dict[str, slice]:
    """Where each part is, in their order. All that is left are the tables."""
    sizes = {"token_ids": form.rows, "sample_rows": form.samples, "spans": 4 * form.spans}
    sizes |= {"blocks": 2 * form.blocks, "sample_blocks": 2 * form.samples}
    places, start = {}, 0
    for name, size in sizes.items():
        places[name] = slice(start, start + size)
        start += -(-size // _ALIGNED) * _ALIGNED
    return places | {"tables": slice(start, None)}


def num_tables(chunks: Sequence[ScheduledChunk]) -> int:
    """Numbers in their tables."""
    return sum([len(chunk.request.blocks) for chunk in chunks])


def pack(chunks: Sequence[ScheduledChunk], form: PromptForm, block_rows: int) -> Ints:
    """The chunks, in their order, and padding, as a flat buffer of the form. block_rows: those of attention.

    Padding is 0, but for blocks, of the first empty span. If there are samples of padding, which are of row 0, its
    block is among those of samples.
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
    if len(sampled) < form.samples:
        last_blocks += 0, 0
    blocks = _blocks(spans, block_rows)
    nowhere = [len(chunks), 0]
    blocks += nowhere * (form.blocks - len(blocks) // 2)
    last_blocks += nowhere * (form.samples - len(last_blocks) // 2)
    # One list, so that there is one array to make: what is done once a step is slow, whatever it is.
    numbers: list[int] = []
    parts = tokens, sampled, spans, blocks, last_blocks, tables
    for place, part in zip(_places(form).values(), parts, strict=True):
        numbers += [0] * (place.start - len(numbers))
        numbers += part
    return int32s(numbers)


def lay_out(chunks: Sequence[ScheduledChunk], block_size: int, block_rows: int, device: torch.device) -> PromptRows:
    """Rows of the chunks alone, without padding."""
    form = PromptForm.exact(chunks, block_rows)
    flat = torch.from_numpy(pack(chunks, form, block_rows))
    return form.rows_of(to_device(flat, device), block_rows, block_size)


def _blocks(spans: Sequence[int], block_rows: int) -> list[int]:
    """[2 B], a span and a row in it; those that see most keys first."""
    found = [
        (-start - row, index, row)
        for index, (count, start) in enumerate(zip(spans[1::4], spans[2::4], strict=True))
        for row in range(0, count, block_rows)
    ]
    return [number for _, index, row in sorted(found) for number in (index, row)]
