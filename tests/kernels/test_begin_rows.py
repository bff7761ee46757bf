"""How a step of prompts begins: each row's place, embedding and norm, beside plain Python and torch."""

from __future__ import annotations

import pytest
import torch

from flexmoe.engine.prompt_graphs import form_of
from flexmoe.engine.prompt_rows import lay_out, pack
from flexmoe.kernels.rms_norm import rms_norm
from flexmoe.kernels.triton.begin_rows import begin_rows
from flexmoe.models.device_rows import PromptRows
from flexmoe.scheduling.step import ScheduledChunk
from tests.cpu.paging import scattered, slot
from tests.kernels.support import DEVICE, DTYPES, assert_near

BLOCK, ROWS, VOCABULARY = 4, 16, 50
# Positions of the first rows, and how many: one chunk, decodes beside prompts, more than are looked at together.
STEPS = [((0, 37),), ((5, 7), (0, 37), (9, 1), (2, 1)), tuple((i % 5, 1 + i % 3) for i in range(130))]


def chunks_of(spans: tuple[tuple[int, int], ...]) -> list[ScheduledChunk]:
    requests, _ = scattered([start + count for start, count in spans], BLOCK, VOCABULARY)
    return [ScheduledChunk(r, start, count, True) for r, (start, count) in zip(requests, spans, strict=True)]


def own(chunks: list[ScheduledChunk]) -> list[tuple[ScheduledChunk, int]]:
    """Of each row its chunk and position."""
    return [(chunk, chunk.start + i) for chunk in chunks for i in range(chunk.num_tokens)]


def padded(chunks: list[ScheduledChunk]) -> PromptRows:
    form = form_of(chunks, ROWS)
    assert form is not None
    return form.rows_of(torch.from_numpy(pack(chunks, form, ROWS)).to(DEVICE), ROWS, BLOCK)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spans", STEPS, ids=len)
def test_rows_without_padding(spans: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
    chunks = chunks_of(spans)
    rows = lay_out(chunks, BLOCK, ROWS, DEVICE)
    H, T = 72, len(rows.token_ids)
    table, weight = torch.randn(VOCABULARY, H, device=DEVICE, dtype=dtype), torch.rand(H, device=DEVICE, dtype=dtype)
    x, normed = torch.empty(T, H, device=DEVICE), table.new_empty(T, H)
    places = begin_rows(rows.token_ids, table, weight, 1e-5, rows.spans, x, normed, by_token=True, padded=rows.padded)
    assert places.positions.tolist() == [at for _, at in own(chunks)]
    assert places.slots.tolist() == [slot(c.request, at, BLOCK) for c, at in own(chunks)]
    assert places.lengths is None
    assert torch.equal(x, table[rows.token_ids.long()].float())
    assert_near(normed, rms_norm(x, weight.float(), 1e-5), dtype)


@pytest.mark.parametrize("spans", STEPS[:2], ids=len)
def test_rows_of_padding_have_no_place(spans: tuple[tuple[int, int], ...]) -> None:
    chunks = chunks_of(spans)
    rows, count = padded(chunks), sum(chunk.num_tokens for chunk in chunks)
    given = torch.randn(len(rows.token_ids), 16, device=DEVICE)
    x, normed = torch.empty_like(given), torch.empty_like(given)
    weight = torch.ones(16, device=DEVICE)
    places = begin_rows(rows.token_ids, given, weight, 1e-5, rows.spans, x, normed, by_token=False, padded=rows.padded)
    assert places.lengths is not None
    assert places.positions.tolist()[:count] == [at for _, at in own(chunks)]
    assert places.lengths.tolist()[:count] == [at + 1 for _, at in own(chunks)]
    assert places.slots.tolist()[:count] == [slot(c.request, at, BLOCK) for c, at in own(chunks)]
    assert places.positions[count:].eq(0).all()
    assert places.lengths[count:].eq(0).all()
    assert places.slots[count:].eq(-1).all()
    assert torch.equal(x, given)
    torch.testing.assert_close(normed, rms_norm(given, weight, 1e-5))


def test_a_step_of_padding_alone_has_no_place() -> None:
    form = form_of(chunks_of(((0, 20),)), ROWS)
    assert form is not None
    rows = form.rows_of(torch.from_numpy(pack((), form, ROWS)).to(DEVICE), ROWS, BLOCK)
    x = torch.empty(form.rows, 16, device=DEVICE)
    table, weight = torch.randn(VOCABULARY, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    places = begin_rows(
        rows.token_ids, table, weight, 1e-5, rows.spans, x, torch.empty_like(x), by_token=True, padded=True
    )
    assert places.slots.eq(-1).all()
    assert places.lengths is not None
    assert places.lengths.eq(0).all()
    assert torch.equal(x, table[:1].expand_as(x))
