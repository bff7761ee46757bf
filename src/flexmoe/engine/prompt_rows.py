"""From a step's chunks to the rows of a PromptDecoder, in one copy to the device that nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexmoe.kernels.prefill_attention import Spans
from flexmoe.models.device_rows import PromptRows
from flexmoe.scheduling.scheduler import ScheduledChunk

Ints = npt.NDArray[np.int32]

_ALIGNED = 4  # numbers of 16 bytes: each part begins at such an address, as compiled kernels expect of all


def lay_out(chunks: Sequence[ScheduledChunk], block_size: int, block_rows: int, device: torch.device) -> PromptRows:
    """Rows of the chunks in their order. block_rows: of the blocks in which attention takes them."""
    spans, at, row, table = np.empty((len(chunks), 4), np.int32), [], 0, 0
    tables = [np.array(chunk.request.blocks, np.int32) for chunk in chunks]
    for index, (chunk, blocks) in enumerate(zip(chunks, tables, strict=True)):
        spans[index] = row, chunk.num_tokens, chunk.start, table
        at.append(np.arange(chunk.start, chunk.start + chunk.num_tokens, dtype=np.int32))
        row, table = row + chunk.num_tokens, table + len(blocks)
    places = [blocks[p // block_size] * block_size + p % block_size for blocks, p in zip(tables, at, strict=True)]
    last = spans[:, 0] + spans[:, 1] - 1
    parts = _sent(
        {
            "token_ids": np.array([t for c in chunks for t in c.request.token_ids[c.start : c.start + c.num_tokens]]),
            "positions": np.concatenate(at),
            "slots": np.concatenate(places),
            "sample_rows": last[[chunk.samples for chunk in chunks]],
            "spans": spans,
            "tables": np.concatenate(tables),
            "blocks": _blocks(spans, block_rows),
        },
        device,
    )
    given = Spans(parts["spans"].view(-1, 4), parts["tables"], parts["blocks"].view(-1, 2), block_rows, block_size)
    return PromptRows(parts["token_ids"], parts["positions"], parts["slots"], given, parts["sample_rows"])


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


def _sent(parts: Mapping[str, npt.NDArray[np.integer]], device: torch.device) -> dict[str, Tensor]:
    """The parts, flat, on the device as int32."""
    starts, size = {}, 0
    for name, part in parts.items():
        starts[name] = size
        size += -(-part.size // _ALIGNED) * _ALIGNED
    host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    for name, part in parts.items():
        host.numpy()[starts[name] : starts[name] + part.size] = part.ravel()
    whole = host.to(device, non_blocking=True)
    return {name: whole[starts[name] : starts[name] + part.size] for name, part in parts.items()}
