"""Embeddings of tokens from the host and from the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexmoe.kernels import embed as reference
from flexmoe.kernels.triton.embed import EmbedTile, embed
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, Guarded, normal

VOCABULARY = 50
SIZES = [(1, 1), (1, 96), (4, 100), (9, 128)] + ([(256, 4096)] if ON_GPU else [])


def _ids(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), SIZES)
@pytest.mark.parametrize("tile", [None, EmbedTile(block=64, num_warps=1)])
def test_takes_the_right_rows(rows: int, hidden: int, dtype: torch.dtype, tile: EmbedTile | None) -> None:
    table, token_ids, sampled = normal(VOCABULARY, hidden, dtype=dtype), _ids(rows), _ids(7)
    sources = torch.randint(-1, 7, (rows,), dtype=torch.int32, device=DEVICE)
    out, chosen = Guarded(rows, hidden), torch.full((rows,), -1, device=DEVICE)
    embed(token_ids, sources, sampled, table, out.tensor, chosen, tile=tile)
    expected, expected_ids = torch.empty_like(out.tensor), torch.empty_like(chosen)
    reference.embed(token_ids, sources, sampled, table, expected, expected_ids)
    assert torch.equal(chosen, expected_ids)
    assert torch.equal(out.check(), expected)


@pytest.mark.parametrize("source", [-1, 0])
def test_reads_only_the_id_that_counts(source: int) -> None:
    far = torch.full((3,), 2**40, device=DEVICE)
    table, ids = normal(VOCABULARY, 32), _ids(3)
    sources = torch.full((3,), source, dtype=torch.int32, device=DEVICE)
    out, chosen = Guarded(3, 32), torch.empty_like(ids)
    embed(*((ids, sources, far) if source < 0 else (far, sources, ids[:1])), table, out.tensor, chosen)
    expected = ids if source < 0 else ids[:1].expand(3)
    assert torch.equal(chosen, expected)
    assert torch.equal(out.check(), table[expected])


def test_chosen_may_overwrite_the_ids() -> None:
    table, ids, sampled = normal(VOCABULARY, 200), _ids(2), _ids(1)
    sources = torch.tensor([-1, 0], dtype=torch.int32, device=DEVICE)
    expected = torch.stack((ids[0], sampled[0]))
    out = Guarded(2, 200)
    embed(ids, sources, sampled, table, out.tensor, ids, tile=EmbedTile(block=256))
    assert torch.equal(ids, expected)
    assert torch.equal(out.check(), table[expected])
