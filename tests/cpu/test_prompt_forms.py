"""Forms that steps of prompts are padded to, and the buffer that holds one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from flexmoe.engine import prompt_graphs
from flexmoe.engine.prompt_graphs import GraphedPrompts, form_of
from flexmoe.engine.prompt_rows import PromptForm, lay_out, pack
from flexmoe.models.device_rows import PromptRows
from flexmoe.models.hopper import HopperKernels
from flexmoe.scheduling.prompt_forms import MOST_GRAPHED, MOST_ON_RANKS, forms_up_to, graph_form
from flexmoe.scheduling.step import ScheduledChunk
from tests.cpu.paging import scattered
from tests.cpu.rerun_graphs import NEEDS_INTERPRETER, RerunPool

BLOCK, ROWS = 4, 16


def chunks_of(*spans: tuple[int, int]) -> list[ScheduledChunk]:
    """Of requests with so many tokens before, and in the step; all but the first sample."""
    requests, _ = scattered([before + count for before, count in spans], BLOCK, 100)
    return [
        ScheduledChunk(request, before, count, index > 0)
        for index, (request, (before, count)) in enumerate(zip(requests, spans, strict=True))
    ]


@pytest.mark.parametrize(("counts", "rows", "spans"), [([1], 16, 2), ([128], 128, 2), ([129], 192, 2),
    ([300, 300, 1], 640, 5), ([1000, 1000], 2048, 3)])  # fmt: skip
def test_a_form_has_room_for_its_step_and_little_more(counts: list[int], rows: int, spans: int) -> None:
    chunks = chunks_of(*((0, count) for count in counts))
    form, exact = form_of(chunks, ROWS), PromptForm.exact(chunks, ROWS)
    assert form is not None
    assert (form.rows, form.spans) == (rows, spans)
    assert form.blocks >= exact.blocks
    assert form.samples >= exact.samples
    assert form.spans > exact.spans


def test_what_is_too_large_has_no_form() -> None:
    assert form_of(chunks_of((0, MOST_GRAPHED)), ROWS) is not None
    assert form_of(chunks_of((0, MOST_GRAPHED), (0, 1)), ROWS) is None
    assert form_of(chunks_of(*[(3, 1)] * 65), ROWS) is None


@pytest.mark.parametrize("most", [MOST_GRAPHED, MOST_ON_RANKS])
def test_forms_are_few(most: int) -> None:
    """As many as there are graphs to record."""
    forms = {graph_form(count, 1, most) for count in range(1, most + 1, 7)}
    assert None not in forms
    assert len(forms) <= 40
    assert graph_form(most + 1, 1, most) is None


def in_form(chunks: list[ScheduledChunk], form: PromptForm) -> PromptRows:
    return form.rows_of(torch.from_numpy(pack(chunks, form, ROWS)), ROWS, BLOCK)


def test_padding_is_in_no_span() -> None:
    chunks = chunks_of((5, 7), (0, 18), (9, 1))
    form = form_of(chunks, ROWS)
    assert form is not None
    rows, exact = in_form(chunks, form), lay_out(chunks, BLOCK, ROWS, torch.device("cpu"))
    assert rows.padded
    assert torch.equal(rows.token_ids[:26], exact.token_ids)
    assert rows.token_ids[26:].eq(0).all()
    assert rows.sample_rows.tolist() == [24, 25, 0, 0]
    blocks = rows.spans.blocks.tolist()
    assert blocks[:4] == exact.spans.blocks.tolist()
    assert all(rows.spans.spans[span].tolist() == [0, 0, 0, 0] for span, _ in blocks[4:])
    assert rows.sample_spans.blocks.tolist() == [[1, 16], [2, 0], [0, 0], [3, 0]]  # row 0 is there for padding
    assert torch.equal(rows.spans.tables, exact.spans.tables)


def test_each_row_is_where_its_request_keeps_it() -> None:
    """Token and span of every row, one by one; a token nobody knows yet is 0."""
    chunks = chunks_of((5, 7), (0, 37), (9, 1), (2, 1))
    unknown = chunks[3].request
    chunks[3] = ScheduledChunk(unknown, unknown.num_tokens, 1, True)
    rows = lay_out(chunks, BLOCK, ROWS, torch.device("cpu"))
    own = [(chunk, chunk.start + i) for chunk in chunks for i in range(chunk.num_tokens)]
    assert rows.token_ids.tolist() == [*(c.request.token_ids[at] for c, at in own[:-1]), 0]
    assert not rows.padded
    assert rows.sample_rows.tolist() == [43, 44, 45]
    spans = rows.spans.spans.tolist()
    assert [tuple(span[:3]) for span in spans] == [(0, 7, 5), (7, 37, 0), (44, 1, 9), (45, 1, 3)]
    for (_, _, _, table), chunk in zip(spans, chunks, strict=True):
        assert rows.spans.tables[table : table + len(chunk.request.blocks)].tolist() == chunk.request.blocks
    assert rows.spans.blocks.tolist() == [[1, 32], [1, 16], [2, 0], [0, 0], [3, 0], [1, 0]]
    assert rows.sample_spans.blocks.tolist() == [[1, 32], [2, 0], [3, 0]]
    assert torch.equal(rows.sample_spans.spans, rows.spans.spans)


def test_each_part_begins_where_compiled_kernels_expect_it() -> None:
    """On 16 bytes, whatever the sizes."""
    form = PromptForm(33, 3, 1, 5, padded=True)
    rows = form.rows_of(torch.arange(form.head + 2, dtype=torch.int32), ROWS, BLOCK)
    parts = rows.token_ids, rows.sample_rows, rows.spans.spans, rows.spans.blocks, rows.sample_spans.blocks
    assert all(part.flatten()[0] % 4 == 0 for part in parts)
    assert rows.spans.tables.tolist() == [form.head, form.head + 1]


def test_a_form_of_padding_alone_has_no_token() -> None:
    form = form_of(chunks_of((0, 20)), ROWS)
    assert form is not None
    rows = in_form([], form)
    assert rows.token_ids.tolist() == [0] * form.rows
    assert rows.spans.spans[:, 1].tolist() == [0] * form.spans
    assert rows.spans.blocks[:, 0].tolist() == [0] * form.blocks


class Noting:
    """A model that notes the rows that it is given, and has a logit for each row that samples: its token."""

    block_rows, hopper = ROWS, HopperKernels()

    def __init__(self) -> None:
        self.rows: PromptRows | None = None

    def logits(self, rows: PromptRows, *_: Any) -> Tensor:
        self.rows = rows
        return rows.token_ids[rows.sample_rows.long()].float()[:, None]

    def choose(self, logits: Tensor, out: Tensor) -> None:
        out.copy_(logits[:, 0])


@NEEDS_INTERPRETER
def test_steps_of_one_form_leave_nothing_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lies where another was before, on the host and on the device; each is as if it were alone."""
    monkeypatch.setattr(prompt_graphs, "GraphPool", RerunPool)
    model, cache, before = Noting(), cast(Any, SimpleNamespace(block_size=BLOCK)), torch.tensor([-1, 77])
    prompts = GraphedPrompts(model, cache, torch.device("cpu"), most_graphed=MOST_GRAPHED)
    steps = [
        ((40, 1), (9, 1), (0, 60)),
        ((3, 1), (0, 1), (5, 1), (50, 3)),
        ((0, 30), (1, 20), (7, 11)),
        ((4, 1), (2, 1), (0, 3)),
    ]
    for step in [*steps, *steps[::-1], *steps]:
        for known in (before, None):
            chunks = chunks_of(*step)
            form = form_of(chunks, ROWS)
            assert form is not None
            logits = prompts.logits(chunks, known)
            alone = in_form(chunks, form)
            if known is not None:
                alone.token_ids[1] = 77
            assert model.rows is not None
            for name in ("token_ids", "sample_rows"):
                assert torch.equal(getattr(model.rows, name), getattr(alone, name)), name
            assert torch.equal(model.rows.spans.spans, alone.spans.spans)
            assert torch.equal(model.rows.spans.blocks, alone.spans.blocks)
            assert torch.equal(model.rows.sample_spans.blocks, alone.sample_spans.blocks)
            tables = alone.spans.tables
            assert torch.equal(model.rows.spans.tables[: len(tables)], tables)
            assert logits[:, 0].tolist() == alone.token_ids[alone.sample_rows.long()].tolist()[: len(logits)]
            assert prompts.likeliest is not None
            assert prompts.likeliest.tolist() == logits[:, 0].tolist()


def test_tables_beyond_the_inputs_make_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_graphs, "GraphPool", RerunPool)
    monkeypatch.setattr(prompt_graphs, "_MOST_TABLES", 1)
    model, cache = Noting(), cast(Any, SimpleNamespace(block_size=BLOCK))
    prompts = GraphedPrompts(model, cache, torch.device("cpu"), most_graphed=16)
    chunks = chunks_of((20_000, 10))
    for _ in range(2):
        prompts.logits(chunks)
        assert model.rows is not None
        assert model.rows.token_ids.tolist() == chunks[0].request.token_ids[20_000:]
        assert prompts.likeliest is None
    assert not prompts._graphs


def test_forms_up_to_some_tokens_are_those_of_their_steps() -> None:
    steps = [(tokens, chunks) for tokens in range(1, 601) for chunks in (1, 3) if tokens >= chunks]
    of_steps = {graph_form(tokens, chunks) for tokens, chunks in steps}
    found = list(forms_up_to(640, (1, 4)))
    assert len(set(found)) == len(found)
    assert set(found) == {form for form in of_steps if form is not None and form[0] <= 640}
    assert list(forms_up_to(2**20, (1,)))[-1] == (MOST_GRAPHED, 1)
