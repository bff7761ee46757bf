"""PackedRows: the inputs of a decode step in one buffer, so that one copy brings them to the device.

Enters: a step's chunks and the samplers' states. Leaves: device tensors that are always at the same address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexmoe.engine.host_buffers import HostBuffers
from flexmoe.engine.sampling_state import SamplingState, uniforms
from flexmoe.engine.wire_rows import WireChunks, WireDecodes, starts_of
from flexmoe.kernels.sample import COLDEST, SampleParams
from flexmoe.models.device_rows import DeviceRows
from flexmoe.scheduling.step import ScheduledChunk

# The wide ones first, so that each is aligned whatever the number of rows.
_FIELDS: Mapping[str, torch.dtype] = {
    "token_ids": torch.int64,
    "uniform": torch.float64,
    "top_p": torch.float64,
    "temperature": torch.float32,
    "min_p": torch.float32,
    "top_k": torch.int32,
    "sources": torch.int32,
    "lengths": torch.int32,
}
_ALL = 2**31 - 1  # a top_k that keeps every token
_STRIDE_BYTES = 16  # the table stride, and room so that the tables behind it are aligned


class PackedRows:
    """Inputs of steps padded to `bucket` rows, on the host and on the device."""

    def __init__(self, bucket: int, most_blocks: int, device: torch.device) -> None:
        """most_blocks: the longest block table that a row can have."""
        self.bucket = bucket
        self._head = bucket * sum(dtype.itemsize for dtype in _FIELDS.values()) + _STRIDE_BYTES
        self._head += -self._head % _STRIDE_BYTES
        size = self._head + 4 * bucket * _padded(most_blocks)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._buffers = HostBuffers(size, torch.uint8, device)
        self._host = [{k: v.numpy() for k, v in self._views(buffer).items()} for buffer in self._buffers.all]
        self._tables = [_Tables(host) for host in self._host]
        on_device = self._views(self._device)
        self.rows = DeviceRows(**{name: on_device[name] for name in DeviceRows.__slots__})
        self.sampling = SampleParams(**{name: on_device[name] for name in SampleParams.__slots__})

    def load(self, chunks: Sequence[ScheduledChunk], sources: Sequence[int], states: Sequence[SamplingState]) -> None:
        """Send the rows of a step to the device, behind what runs there.

        sources: for each row the place of its token among those of the last step, which the host does not know yet; or
        -1, and the host knows it.
        """
        turn = self._buffers.take()
        host = self._host[turn]
        _write_tokens(host, chunks, sources)
        _write_sampling(host, states)
        width = self._tables[turn].write(chunks)
        self._buffers.send(self._device, self._head + 4 * self.bucket * width)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        views, start = {}, 0
        for name, dtype in _FIELDS.items():
            stop = start + self.bucket * dtype.itemsize
            views[name] = buffer[start:stop].view(dtype)
            start = stop
        views["table_stride"] = buffer[self._head - _STRIDE_BYTES : self._head - _STRIDE_BYTES + 4].view(torch.int32)
        views["tables"] = buffer[self._head :].view(torch.int32)
        return views


def _padded(blocks: int) -> int:
    """How far apart tables of so many blocks stand: on 16 bytes."""
    return blocks + -blocks % 4


Fields = Mapping[str, npt.NDArray[Any]]


def _write_tokens(host: Fields, chunks: Sequence[ScheduledChunk], sources: Sequence[int]) -> None:
    count = len(chunks)
    host["sources"][:count] = sources
    host["sources"][count:] = -1
    if isinstance(chunks, WireDecodes):
        host["token_ids"][:count] = chunks.arrays.tokens
    else:
        known = [c.request.token_ids[c.start] if s < 0 else 0 for c, s in zip(chunks, sources, strict=True)]
        host["token_ids"][:count] = known
    host["token_ids"][count:] = 0
    host["lengths"][:count] = starts_of(chunks)
    host["lengths"][:count] += 1
    host["lengths"][count:] = 0


def _write_sampling(host: Fields, states: Sequence[SamplingState]) -> None:
    """Behind the sources. Rows without a state, and padded ones, are greedy: that is the cheapest."""
    count = len(states)
    temperatures = [state.params.temperature for state in states]
    host["temperature"][:count] = [t and max(t, COLDEST) for t in temperatures]  # fp32 would make a colder one 0
    host["temperature"][count:] = 0.0
    if not host["temperature"].any():
        return
    host["top_k"][:count] = [min(state.params.top_k, _ALL) for state in states]
    host["top_p"][:count] = [state.params.top_p for state in states]
    host["min_p"][:count] = [state.params.min_p for state in states]
    host["uniform"][:count] = uniforms(states, host["sources"][:count] >= 0)


class _Tables:
    """The block tables in one buffer on the host. A row that is there already is not written again."""

    def __init__(self, host: Fields) -> None:
        self._stride, self._tables = host["table_stride"], host["tables"]
        self._width = 0
        # Of each row the list that was written and how much of it: a list of blocks only ever grows.
        self._rows: list[tuple[list[int], int]] = []

    def write(self, chunks: Sequence[ScheduledChunk]) -> int:
        """Each row's blocks, as far apart as the longest table is long; returns that."""
        if isinstance(chunks, WireDecodes):
            return self._write_all(chunks.arrays)
        tables = [chunk.request.blocks for chunk in chunks]
        lengths = list(map(len, tables))
        width = _padded(max(lengths, default=0))
        there, self._rows = self._rows, []  # until all are written: Ctrl-C may come between
        if width != self._width:
            self._stride[0] = self._width = width
            there = []
        for row, (blocks, length) in enumerate(zip(tables, lengths, strict=True)):
            if row >= len(there) or there[row][1] != length or there[row][0] is not blocks:
                self._tables[row * width : row * width + length] = blocks
        self._rows = list(zip(tables, lengths, strict=True))
        return width

    def _write_all(self, rows: WireChunks) -> int:
        """All at once: what came over the wire says of no row that it is there already."""
        counts, self._rows = rows.num_blocks, []
        width = self._stride[0] = self._width = _padded(int(counts.max(initial=0)))
        first = np.cumsum(counts) - counts  # of each row's, in what came
        gaps = np.arange(len(counts)) * width - first
        self._tables[np.arange(len(rows.blocks)) + gaps.repeat(counts)] = rows.blocks
        return width
