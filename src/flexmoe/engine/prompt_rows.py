"""From a step's chunks to the rows of a PromptDecoder: one flat buffer of numbers, so that one copy brings them over.

Enters: chunks. Leaves: the buffer, and views of it. What a `PromptForm` has room for beyond the chunks is padding, so
that one CUDA graph serves all steps of a form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexmoe.kernels.prefill_attention import Spans
from flexmoe.models.device_rows import PromptRows
from flexmoe.scheduling.step import ScheduledChunk

Ints = npt.NDArray[np.int32]

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

    def sizes(self) -> dict[str, int]:
        """Numbers in each part of the buffer, in their order. All that is left are the tables."""
        sizes = {"token_ids": self.rows, "positions": self.rows, "slots": self.rows}
        sizes |= {"lengths": self.rows} if self.padded else {}
        return sizes | {"sample_rows": self.samples, "spans": 4 * self.spans, "blocks": 2 * self.blocks}

    def starts(self) -> dict[str, int]:
        """Where each part begins, the tables last."""
        starts, size = {}, 0
        for name, count in self.sizes().items():
            starts[name] = size
            size += -(-count // _ALIGNED) * _ALIGNED
        return starts | {"tables": size}

    def rows_of(self, flat: Tensor, block_rows: int, block_size: int) -> PromptRows:
        """Views of a buffer of this form."""
        starts, sizes = self.starts(), self.sizes()
        part = {name: flat[starts[name] : starts[name] + size] for name, size in sizes.items()}
        tables = flat[starts["tables"] :]
        spans = Spans(part["spans"].view(-1, 4), tables, part["blocks"].view(-1, 2), block_rows, block_size)
        return PromptRows(
            part["token_ids"], part["positions"], part["slots"], spans, part["sample_rows"], part.get("lengths")
        )


def pack(
    chunks: Sequence[ScheduledChunk], form: PromptForm, block_size: int, block_rows: int, *, pinned: bool
) -> Tensor:
    """The chunks, in their order, as a flat int32 buffer of the form on the host. block_rows: those of attention."""
    tables = [np.array(chunk.request.blocks, np.int32) for chunk in chunks]
    at = [np.arange(chunk.start, chunk.start + chunk.num_tokens, dtype=np.int32) for chunk in chunks]
    spans = np.zeros((form.spans, 4), np.int32)
    row, table = 0, 0
    for index, (chunk, blocks) in enumerate(zip(chunks, tables, strict=True)):
        spans[index] = row, chunk.num_tokens, chunk.start, table
        row, table = row + chunk.num_tokens, table + len(blocks)
    last = spans[: len(chunks), 0] + spans[: len(chunks), 1] - 1
    parts: dict[str, npt.NDArray[np.integer]] = {
        "token_ids": np.concatenate([np.array(_tokens(chunk)) for chunk in chunks]),
        "positions": np.concatenate(at),
        "slots": np.concatenate(
            [blocks[p // block_size] * block_size + p % block_size for blocks, p in zip(tables, at, strict=True)]
        ),
        "sample_rows": last[[chunk.samples for chunk in chunks]],
        "spans": spans,
        "blocks": _blocks(spans[: len(chunks)], block_rows),
        "tables": np.concatenate(tables),
    }
    if form.padded:
        parts["lengths"] = parts["positions"] + 1
    return _flat(parts, form, len(chunks), pinned=pinned)


def pack_nothing(form: PromptForm, *, pinned: bool) -> Tensor:
    """As `pack`, of a form that holds padding alone."""
    return _flat({"tables": np.zeros(1, np.int32)}, form, 0, pinned=pinned)


def lay_out(chunks: Sequence[ScheduledChunk], block_size: int, block_rows: int, device: torch.device) -> PromptRows:
    """Rows of the chunks alone, without padding."""
    form = PromptForm.exact(chunks, block_rows)
    flat = pack(chunks, form, block_size, block_rows, pinned=device.type == "cuda")
    return form.rows_of(flat.to(device, non_blocking=True), block_rows, block_size)


def _tokens(chunk: ScheduledChunk) -> Sequence[int]:
    """0 for a decode whose token only the device knows."""
    return chunk.request.token_ids[chunk.start : chunk.start + chunk.num_tokens] or (0,)


def _blocks(spans: Ints, block_rows: int) -> Ints:
    """int32 [B, 2], a span and a row in it; those that see most keys first."""
    found = [
        np.stack((np.full(len(first), index), first), 1)
        for index, count in enumerate(spans[:, 1])
        for first in [np.arange(0, count, block_rows)]
    ]
    blocks = np.concatenate(found)
    order = np.argsort(-(spans[blocks[:, 0], 2] + blocks[:, 1]), kind="stable")
    longest_first: Ints = blocks[order].astype(np.int32)
    return longest_first


def _flat(parts: dict[str, npt.NDArray[np.integer]], form: PromptForm, chunks: int, *, pinned: bool) -> Tensor:
    """The parts in their places. Padding is 0, but for places in the cache, -1, and blocks, of the first empty span."""
    starts, sizes = form.starts(), form.sizes() | {"tables": parts["tables"].size}
    flat = torch.empty(starts["tables"] + sizes["tables"], dtype=torch.int32, pin_memory=pinned)
    host: Ints = flat.numpy()
    if form.padded:
        host[: starts["tables"]] = 0
        host[starts["slots"] : starts["slots"] + sizes["slots"]] = -1
        host[starts["blocks"] : starts["blocks"] + sizes["blocks"] : 2] = chunks
    for name, part in parts.items():
        host[starts[name] : starts[name] + part.size] = part.ravel()
    return flat
