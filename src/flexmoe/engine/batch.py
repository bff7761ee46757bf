"""From a Step to a ForwardBatch: positions, cache slots, and which keys each row sees.

Everything here is index arithmetic on the block tables, done once a step and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexmoe.engine.device import to_device
from flexmoe.kernels.cpu.decode import PagedRows
from flexmoe.kernels.paged_attention import DecodeGroup, PrefillSpan
from flexmoe.layers.forward_batch import ForwardBatch, Probe
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk, Step

Array = npt.NDArray[Any]

# A row whose slots are consecutive reads them in place. Gathering many short rows together saves calls instead:
# from about this many keys a row, copying them costs more than a call of its own.
_ALONE_FROM_KEYS = 256
# Keys gathered together at most, padding included; bounds the memory of the copies.
_GATHERED_KEYS = 16384


def build_batch(
    step: Step,
    block_size: int,
    windows: Sequence[int | None],
    device: torch.device,
    probe: Probe | None = None,
    most_rows: int | None = None,
) -> ForwardBatch:
    """Lay out the step's chunks, T rows in their order. windows: the distinct attention windows of the model.

    most_rows: rows of the data rank that has most, if there are several.
    """
    chunks = step.chunks
    rows = sum(chunk.num_tokens for chunk in chunks)
    # Token ids, positions and slots [3, T], which travel together.
    index = np.empty((3, rows), dtype=np.int64)
    sample_rows: list[int] = []
    start = 0
    for chunk in chunks:
        stop, end = start + chunk.num_tokens, chunk.start + chunk.num_tokens
        index[0, start:stop] = chunk.request.token_ids[chunk.start : end]
        index[1, start:stop] = np.arange(chunk.start, end)
        index[2, start:stop] = _slots(chunk.request, chunk.start, end, block_size)
        start = stop
        if chunk.samples:
            sample_rows.append(stop - 1)
    token_ids, positions, slots = to_device(torch.from_numpy(index), device).unbind(0)
    every_row = len(sample_rows) == rows
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slots,
        attention={window: _groups(step, block_size, window, device) for window in windows},
        sample_rows=None if every_row else to_device(torch.tensor(sample_rows, dtype=torch.int64), device),
        probe=probe,
        most_rows=rows if most_rows is None else most_rows,
    )


def build_paged_rows(step: Step, block_size: int) -> PagedRows:
    """Lay out a step of decodes for the C kernels, which read the block tables themselves."""
    requests = [chunk.request for chunk in step.chunks]
    return PagedRows(
        np.array([request.token_ids[-1] for request in requests], dtype=np.int64),
        _tables(requests),
        np.array([len(request.token_ids) for request in requests], dtype=np.int32),
        np.arange(len(requests)),
        block_size,
    )


def build_prompt_rows(step: Step, block_size: int, most: int | None) -> list[PagedRows]:
    """Lay out a step of prompts for the C kernels, in pieces of at most `most` rows to be computed in this order."""
    chunks = step.chunks
    counts = [chunk.num_tokens for chunk in chunks]
    owners = np.repeat(np.arange(len(chunks)), counts)  # the chunk of each row
    token_ids = np.empty(len(owners), dtype=np.int64)
    lengths = np.empty(len(owners), dtype=np.int32)
    samples = np.array([chunk.samples for chunk in chunks], dtype=bool)
    ends = np.cumsum(counts)
    for chunk, end in zip(chunks, ends, strict=True):
        own, stop = slice(end - chunk.num_tokens, end), chunk.start + chunk.num_tokens
        token_ids[own] = chunk.request.token_ids[chunk.start : stop]
        lengths[own] = np.arange(chunk.start + 1, stop + 1)
    sampled, tables = ends[samples] - 1, _tables([chunk.request for chunk in chunks])
    pieces = []
    for first in range(0, len(owners), most or len(owners)):
        rows = slice(first, first + (most or len(owners)))
        inside = sampled[(sampled >= rows.start) & (sampled < rows.stop)] - first
        pieces.append(PagedRows(token_ids[rows], tables[owners[rows]], lengths[rows], inside, block_size, prompts=True))
    return pieces


def _tables(requests: Sequence[Request]) -> npt.NDArray[np.int32]:
    """The blocks of each request, filled up with zeros."""
    tables = np.zeros((len(requests), max(len(request.blocks) for request in requests)), dtype=np.int32)
    for row, request in enumerate(requests):
        tables[row, : len(request.blocks)] = request.blocks
    return tables


def _slots(request: Request, start: int, stop: int, block_size: int) -> Array:
    """Cache slots of the positions start..stop-1."""
    if request.contiguous:
        base = request.blocks[0] * block_size
        return np.arange(base + start, base + stop)
    first = start // block_size
    blocks = np.array(request.blocks[first : -(-stop // block_size)], dtype=np.int64)
    inside = np.arange(block_size)
    own: Array = (blocks[:, None] * block_size + inside).ravel()
    return own[start - first * block_size : stop - first * block_size]


def _groups(step: Step, block_size: int, window: int | None, device: torch.device) -> list[DecodeGroup | PrefillSpan]:
    groups: list[DecodeGroup | PrefillSpan] = []
    groups += _decode_groups(step.chunks[: step.num_decodes], block_size, window, device)
    row = step.num_decodes
    for chunk in step.chunks[step.num_decodes :]:
        groups.append(_prefill_span(chunk, row, block_size, window, device))
        row += chunk.num_tokens
    return groups


def _decode_groups(
    chunks: Sequence[ScheduledChunk], block_size: int, window: int | None, device: torch.device
) -> list[DecodeGroup]:
    """Rows one by one where their keys lie in a row, else gathered in runs of neighbours."""
    groups: list[DecodeGroup] = []
    gathered: list[Array] = []
    longest = 0
    for row, chunk in enumerate(chunks):
        stop = chunk.start + 1
        start = 0 if window is None else max(0, stop - window)
        alone = chunk.request.contiguous and (len(chunks) == 1 or stop - start >= _ALONE_FROM_KEYS)
        if gathered and (alone or max(longest, stop - start) * (len(gathered) + 1) > _GATHERED_KEYS):
            groups.append(_gathered_group(gathered, row, device))
            gathered, longest = [], 0
        keys = _slots(chunk.request, start, stop, block_size)
        if alone:
            groups.append(DecodeGroup(slice(row, row + 1), slice(int(keys[0]), int(keys[-1]) + 1), None))
        else:
            gathered.append(keys)
            longest = max(longest, stop - start)
    if gathered:
        groups.append(_gathered_group(gathered, len(chunks), device))
    return groups


def _gathered_group(keys: list[Array], end_row: int, device: torch.device) -> DecodeGroup:
    """The rows before `end_row`, shorter ones padded and masked.

    Padding repeats a key of the row's own: a masked one is multiplied by 0, and another request's may be NaN.
    """
    lengths = np.array([len(k) for k in keys])
    longest = int(lengths.max())
    table = np.empty((len(keys), longest), dtype=np.int64)
    for row, k in enumerate(keys):
        table[row, : len(k)] = k
        table[row, len(k) :] = k[-1]
    mask: Tensor | None = None
    if (lengths != longest).any():
        seen = np.arange(longest) < lengths[:, None]
        mask = to_device(torch.from_numpy(seen), device)[:, None, None]
    rows = slice(end_row - len(keys), end_row)
    return DecodeGroup(rows, to_device(torch.from_numpy(table), device), mask)


def _prefill_span(
    chunk: ScheduledChunk, row: int, block_size: int, window: int | None, device: torch.device
) -> PrefillSpan:
    stop = chunk.start + chunk.num_tokens
    first = 0 if window is None else max(0, chunk.start - window + 1)  # the first key that any row sees
    slots = _slots(chunk.request, first, stop, block_size)
    keys: slice | Tensor
    if chunk.request.contiguous:
        keys = slice(int(slots[0]), int(slots[-1]) + 1)
    else:
        keys = to_device(torch.from_numpy(slots), device)
    mask = None
    if first < chunk.start or (window is not None and stop > window):
        query = torch.arange(chunk.start, stop, device=device)[:, None]
        key = torch.arange(first, stop, device=device)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
    return PrefillSpan(slice(row, row + chunk.num_tokens), keys, mask)
