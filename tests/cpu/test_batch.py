"""build_batch: whatever the blocks, chunks and windows, each row sees the keys of exactly the positions it may see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.engine import batch as module
from flexmoe.engine.batch import build_batch, build_paged_rows
from flexmoe.kernels.paged_attention import DecodeGroup, PrefillSpan, paged_attention
from flexmoe.layers.forward_batch import ForwardBatch
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk, Step
from tests.cpu.nearness import assert_near
from tests.cpu.paging import decode_step, decodes, naive_attention, request, scattered, seen, slot

CPU = torch.device("cpu")


@dataclass
class Drawn:
    """A step, and the limits by which decodes are grouped."""

    step: Step
    block_size: int
    window: int | None
    alone_from: int
    gathered: int


@contextmanager
def limits(alone_from: int, gathered: int) -> Iterator[None]:
    """Small ones, so that short sequences meet all of the ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ALONE_FROM_KEYS", alone_from)
        patch.setattr(module, "_GATHERED_KEYS", gathered)
        yield


@st.composite
def drawn_steps(draw: Any) -> Drawn:
    """Some decodes, then some prefills with or without a prefix, some of which sample."""
    block_size = draw(st.integers(1, 5))
    counts = draw(st.tuples(st.integers(0, 6), st.integers(0, 3)).filter(any))
    lengths = [draw(st.integers(1, 24)) for _ in range(sum(counts))]
    needed = [-(-length // block_size) + draw(st.integers(0, 1)) for length in lengths]
    dealt = draw(st.permutations(range(sum(needed) + 2)))
    requests = []
    for length, count in zip(lengths, needed, strict=True):
        blocks, dealt = dealt[:count], dealt[count:]
        if draw(st.booleans()):  # often side by side, in a range of their own
            base = 1000 * (len(requests) + 1)
            blocks = range(base, base + count)
        tokens = [1000 * len(requests) + i for i in range(length)]
        requests.append(request(tokens, blocks, f"r{len(requests)}"))
    chunks = decodes(requests[: counts[0]])
    for r in requests[counts[0] :]:
        start = draw(st.integers(0, r.num_tokens - 1))
        count = draw(st.integers(1, r.num_tokens - start))
        chunks.append(ScheduledChunk(r, start, count, start + count == r.num_tokens))
    window = draw(st.none() | st.integers(1, 30))
    return Drawn(Step(chunks, counts[0], []), block_size, window, draw(st.integers(1, 30)), draw(st.integers(1, 60)))


def positions(step: Step) -> list[tuple[Request, int]]:
    """Of each row, its request and position."""
    return [(chunk.request, chunk.start + i) for chunk in step.chunks for i in range(chunk.num_tokens)]


def keys_by_row(batch: ForwardBatch, window: int | None, rows: int) -> list[list[int]]:
    """Rebuild from the groups which cache slots each row attends to, in order."""
    keys: list[list[int]] = [[] for _ in range(rows)]
    for group in batch.attention[window]:
        numbers = range(group.rows.start, group.rows.stop)
        for i, row in enumerate(numbers):
            assert not keys[row], f"row {row} is in two groups"
            if isinstance(group.keys, slice):
                slots = list(range(group.keys.start, group.keys.stop))
            else:
                slots = (group.keys[i] if isinstance(group, DecodeGroup) else group.keys).tolist()
            if isinstance(group, PrefillSpan):
                visible = [j <= i for j in range(len(slots))] if group.mask is None else group.mask[i].tolist()
                assert group.mask is not None or len(slots) == len(numbers), "plain causal needs as many keys as rows"
            else:
                visible = [True] * len(slots) if group.mask is None else group.mask[i, 0, 0].tolist()
            keys[row] = [slot for slot, sees in zip(slots, visible, strict=True) if sees]
    return keys


@given(drawn_steps())
def test_every_row_sees_its_positions_and_no_others(drawn: Drawn) -> None:
    step, size, window = drawn.step, drawn.block_size, drawn.window
    with limits(drawn.alone_from, drawn.gathered):
        batch = build_batch(step, size, [window], CPU)
    wanted = positions(step)
    assert batch.token_ids.tolist() == [r.token_ids[p] for r, p in wanted]
    assert batch.positions.tolist() == [p for _, p in wanted]
    assert batch.slot_mapping.tolist() == [slot(r, p, size) for r, p in wanted]
    assert {t.dtype for t in (batch.token_ids, batch.positions, batch.slot_mapping)} == {torch.int64}
    keys = keys_by_row(batch, window, len(wanted))
    assert keys == [[slot(r, q, size) for q in seen(p, window)] for r, p in wanted]


@given(drawn_steps())
def test_rows_that_sample(drawn: Drawn) -> None:
    batch = build_batch(drawn.step, drawn.block_size, [None], CPU)
    lasts, row = [], -1
    for chunk in drawn.step.chunks:
        row += chunk.num_tokens
        lasts += [row] if chunk.samples else []
    found = list(range(row + 1)) if batch.sample_rows is None else batch.sample_rows.tolist()
    assert found == lasts
    assert (batch.sample_rows is None) == (len(lasts) == row + 1)


@given(drawn_steps())
def test_copies_of_gathered_keys_are_bounded(drawn: Drawn) -> None:
    with limits(drawn.alone_from, drawn.gathered):
        batch = build_batch(drawn.step, drawn.block_size, [drawn.window], CPU)
    for group in batch.attention[drawn.window]:
        if isinstance(group, DecodeGroup) and isinstance(group.keys, torch.Tensor) and len(group.keys) > 1:
            assert group.keys.numel() <= drawn.gathered


def test_each_window_of_the_model_gets_its_groups() -> None:
    requests, _ = scattered([9, 4], 2)
    batch = build_batch(decode_step(requests), 2, [None, 3], CPU)
    assert set(batch.attention) == {None, 3}
    assert [len(row) for row in keys_by_row(batch, None, 2)] == [9, 4]
    assert [len(row) for row in keys_by_row(batch, 3, 2)] == [3, 3]


def test_the_probe_is_passed_on() -> None:
    class Probe:
        def record(self, stage: str, layer: int, tensor: torch.Tensor) -> None: ...

    probe, requests = Probe(), scattered([3], 2)[0]
    assert build_batch(decode_step(requests), 2, [None], CPU, probe).probe is probe
    assert build_batch(decode_step(requests), 2, [None], CPU).probe is None


@pytest.mark.parametrize("blocks", [[4, 5, 6], [6, 2, 9]])
def test_a_long_row_is_read_in_place_if_it_can_be(blocks: list[int]) -> None:
    one, other = request(range(300), range(100, 400)), request(range(5), blocks)
    groups = build_batch(decode_step([other, one]), 2, [None], CPU).attention[None]
    assert [isinstance(group.keys, slice) for group in groups] == [False, True]
    (alone,) = build_batch(decode_step([other]), 2, [None], CPU).attention[None]
    assert isinstance(alone.keys, slice) == other.contiguous


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_nan_in_slots_a_row_does_not_see_stays_there(window: int | None, dtype: torch.dtype) -> None:
    """Slots are reused without being cleared; and another request's NaN, in any slot, is that request's alone."""
    size, num_heads, num_kv, dim = 4, 4, 2, 16
    requests, num_blocks = scattered([1, 18, 7, 11], size)
    chunks = [*decodes(requests[:3]), ScheduledChunk(requests[3], 6, 5, True)]
    step = Step(chunks, 3, [])
    batch = build_batch(step, size, [window], CPU)
    keys = keys_by_row(batch, window, 8)
    for own in ([0], [1], [2], [3, 4, 5, 6, 7]):  # the rows of one request
        cache = torch.full((num_blocks * size, 2, num_kv, dim), float("nan"), dtype=dtype)
        used = sorted({slot for row in own for slot in keys[row]})
        cache[used] = torch.randn(len(used), 2, num_kv, dim).to(dtype)
        query = torch.randn(8, num_heads, dim).to(dtype)
        out = paged_attention(query, cache, batch.attention[window])
        for row in own:
            assert_near(out[row], naive_attention(query[row], cache[keys[row], 0], cache[keys[row], 1]))


def test_paged_rows() -> None:
    requests = [request([5, 6, 7], [3, 1]), request([9], [8]), request([1, 2], [4, 0, 2])]
    rows = build_paged_rows(decode_step(requests), 2)
    assert rows.block_size == 2
    assert rows.token_ids.tolist() == [7, 9, 2]
    assert rows.lengths.tolist() == [3, 1, 2]
    assert [row[: len(r.blocks)].tolist() for row, r in zip(rows.tables, requests, strict=True)] == [
        [3, 1], [8], [4, 0, 2]
    ]  # fmt: skip
    assert (rows.token_ids.dtype, rows.tables.dtype, rows.lengths.dtype) == ("int64", "int32", "int32")
    assert all(array.flags.c_contiguous for array in (rows.token_ids, rows.tables, rows.lengths))
