"""Sequences in scattered blocks, and attention over their keys one by one, for the tests of everything paged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmoe.config.sampling import SamplingParams
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk, Step


def request(tokens: Sequence[int], blocks: Sequence[int], name: str = "r") -> Request:
    """A running request with its blocks, `contiguous` as the block manager would have it."""
    made = Request(name, tokens, SamplingParams(), eos_token_ids=(), max_total_tokens=2**40)
    made.blocks = list(blocks)
    made.contiguous = all(b == blocks[0] + i for i, b in enumerate(blocks))
    return made


def scattered(lengths: Sequence[int], block_size: int, vocab: int = 100, spare: int = 3) -> tuple[list[Request], int]:
    """Requests of so many tokens each, in blocks dealt at random. Leaves: them, and the number of blocks in all.

    spare: blocks that nobody has. Each request also holds one block more than it needs, as growing ones do.
    """
    counts = [-(-length // block_size) + 1 for length in lengths]
    total = sum(counts) + spare
    dealt = torch.randperm(total).tolist()
    requests = []
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks, dealt = dealt[:count], dealt[count:]
        tokens = torch.randint(vocab, (length,)).tolist()
        requests.append(request(tokens, blocks, f"r{number}"))
    return requests, total


def decodes(requests: Sequence[Request]) -> list[ScheduledChunk]:
    """The chunks that compute each request's latest token."""
    return [ScheduledChunk(r, r.num_tokens - 1, 1, True) for r in requests]


def decode_step(requests: Sequence[Request]) -> Step:
    return Step(decodes(requests), len(requests), [])


def slot(request: Request, position: int, block_size: int) -> int:
    """Where the cache keeps this position's key and value."""
    return request.blocks[position // block_size] * block_size + position % block_size


def seen(position: int, window: int | None) -> range:
    """The positions that a query at `position` sees."""
    return range(0 if window is None else max(0, position - window + 1), position + 1)


def naive_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [Hq, D] over keys and values [L, Hkv, D], head by head in fp64."""
    out = torch.empty(query.shape, dtype=torch.float64)
    per_kv = query.shape[0] // keys.shape[1]
    for head, q in enumerate(query.double()):
        k, v = keys[:, head // per_kv].double(), values[:, head // per_kv].double()
        out[head] = torch.softmax(k @ q / q.shape[0] ** 0.5, 0) @ v
    return out
