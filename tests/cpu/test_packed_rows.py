"""The packed inputs of a decode step: every field arrives, whatever the number of rows and the length of tables."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.sampling_state import SamplingState, uniforms
from flexmoe.engine.together import DecodeTraits
from flexmoe.engine.wire import pack, unpack
from flexmoe.engine.wire_rows import WireDecodes
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk, Step
from tests.cpu.paging import decodes, request

CPU = torch.device("cpu")


def rows_of(lengths: Sequence[int], block_size: int = 16) -> list[Request]:
    """Requests of so many tokens with just the blocks they need, no two alike."""
    made, first = [], 0
    for number, length in enumerate(lengths):
        count = -(-length // block_size)
        made.append(request(list(range(number, number + length)), range(first, first + count), f"r{number}"))
        first += count
    return made


@pytest.mark.parametrize("most_blocks", [1, 2, 3, 4, 5, 9, 13])
@pytest.mark.parametrize("bucket", [1, 3, 8])
def test_every_row_finds_its_blocks(most_blocks: int, bucket: int) -> None:
    requests = rows_of([16 * most_blocks - row % 16 for row in range(bucket)])
    packed = PackedRows(bucket, most_blocks, CPU)
    packed.load(decodes(requests), [-1] * bucket, ())
    stride = int(packed.rows.table_stride)
    for row, sequence in enumerate(requests):
        found = packed.rows.tables[row * stride : row * stride + len(sequence.blocks)]
        assert found.tolist() == sequence.blocks
    assert packed.rows.token_ids.tolist() == [r.token_ids[-1] for r in requests]
    assert packed.rows.lengths.tolist() == [r.num_tokens for r in requests]
    assert packed.rows.sources.tolist() == [-1] * bucket


def test_an_idle_data_rank_has_padding_alone() -> None:
    packed, (busy,) = PackedRows(4, 3, CPU), rows_of([40])
    for _ in range(3):  # every host buffer in turn
        packed.load(decodes([busy]), [-1], ())
    for _ in range(3):
        packed.load([], [], ())
        assert packed.rows.lengths.tolist() == [0] * 4
        assert packed.rows.token_ids.tolist() == [0] * 4
        assert packed.rows.sources.tolist() == [-1] * 4
        packed.load(decodes([busy]), [-1], ())
        assert packed.rows.tables[: len(busy.blocks)].tolist() == busy.blocks


def test_what_ctrl_c_cuts_short_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows changed places, and one of them was written, when it came; then they are back where they were."""

    class Cut(list[int]):
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

    first, second = rows_of([40, 33])
    packed = PackedRows(2, 4, CPU)
    for _ in range(3):  # every host buffer in turn
        packed.load(decodes([first, second]), [-1] * 2, ())
    with monkeypatch.context() as patch:
        patch.setattr(first, "blocks", Cut(first.blocks))
        with pytest.raises(KeyboardInterrupt):
            packed.load(decodes([second, first]), [-1] * 2, ())
    for _ in range(3):
        packed.load(decodes([first, second]), [-1] * 2, ())
        stride = int(packed.rows.table_stride)
        assert packed.rows.tables[:3].tolist() == first.blocks
        assert packed.rows.tables[stride : stride + 3].tolist() == second.blocks


def test_padding_is_empty_and_greedy_after_a_fuller_step() -> None:
    packed = PackedRows(4, 2, CPU)
    states = [SamplingState(SamplingParams(temperature=0.7, top_k=3, top_p=0.5, min_p=0.1), seed) for seed in range(4)]
    packed.load(decodes(rows_of([5, 6, 7, 8])), [-1] * 4, states)
    for _ in range(3):  # every host buffer in turn
        packed.load(decodes(rows_of([9])), [-1], states[:1])
        assert packed.rows.lengths.tolist() == [9, 0, 0, 0]
        assert packed.rows.token_ids.tolist() == [8, 0, 0, 0]
        assert packed.sampling.temperature.tolist() == pytest.approx([0.7, 0, 0, 0])


def test_rows_ahead_name_where_their_tokens_come_from() -> None:
    first, second = rows_of([6, 9])
    state = SamplingState(SamplingParams(temperature=1.0), 3)
    packed = PackedRows(2, 1, CPU)
    chunks = [ScheduledChunk(second, 9, 1, True), ScheduledChunk(first, 5, 1, True)]
    packed.load(chunks, [1, 0], [state, state])
    assert packed.rows.sources.tolist() == [1, 0]
    assert packed.rows.lengths.tolist() == [10, 6]
    assert packed.sampling.uniform.tolist() == [state.uniform(ahead=1)] * 2
    packed.load(chunks, [1, -1], [state, state])  # a newcomer beside one whose token is on its way
    assert packed.sampling.uniform.tolist() == [state.uniform(ahead=1), state.uniform()]
    assert packed.rows.token_ids.tolist() == [0, first.token_ids[5]]


def test_tables_are_right_however_rows_come_grow_and_go() -> None:
    """Only what has changed is written; what a host buffer holds from three steps ago must not stay."""
    rng = random.Random(0)
    packed, running = PackedRows(4, 12, CPU), rows_of([16, 30, 90])
    for step in range(300):
        change = rng.random()
        if change < 0.1 and len(running) > 1:
            running.pop(rng.randrange(len(running)))
        elif change < 0.2 and len(running) < 4:
            blocks = [rng.randrange(1000) for _ in range(rng.randint(1, 8))]
            running.insert(rng.randint(0, len(running)), request([1], blocks, f"r{step}"))
        elif change < 0.3:
            rng.shuffle(running)
        elif change < 0.4:  # preempted, and admitted again elsewhere
            again = rng.choice(running)
            again.blocks = [rng.randrange(1000) for _ in again.blocks]
        elif change < 0.8:
            rng.choice(running).blocks.append(rng.randrange(1000))
        running = [row for row in running if len(row.blocks) < 12] or rows_of([16])
        packed.load([ScheduledChunk(row, 0, 1, True) for row in running], [-1] * len(running), ())
        stride = int(packed.rows.table_stride)
        for place, row in enumerate(running):
            assert packed.rows.tables[place * stride : place * stride + len(row.blocks)].tolist() == row.blocks


def contents(packed: PackedRows, rows: Sequence[Request]) -> list[Any]:
    """What the device gets of these rows, and how all are padded."""
    stride = int(packed.rows.table_stride)
    tables = [packed.rows.tables[i * stride : i * stride + len(row.blocks)].tolist() for i, row in enumerate(rows)]
    fields = packed.rows.token_ids, packed.rows.lengths, packed.rows.sources, packed.sampling.temperature
    return [stride, tables, *(field.tolist() for field in fields)]


def test_rows_that_came_over_the_wire_are_written_alike() -> None:
    """Whatever was in the buffers before: rows of this process, or fewer and shorter ones."""
    rng = random.Random(1)
    ours, theirs = PackedRows(5, 12, CPU), PackedRows(5, 12, CPU)
    for _ in range(60):
        rows = rows_of([rng.randint(1, 150) for _ in range(rng.randint(0, 5))])
        step, states = (
            Step(decodes(rows), len(rows), []),
            [SamplingState(SamplingParams(temperature=0.5), 1)] * len(rows),
        )
        sources = None
        if rng.random() < 0.5:  # some tokens are not known yet
            sources = [rng.choice([-1, place]) for place in range(len(rows))]
            starts = [row.num_tokens - (source < 0) for row, source in zip(rows, sources, strict=True)]
            step.chunks = [ScheduledChunk(row, start, 1, True) for row, start in zip(rows, starts, strict=True)]
        wire = pickle.loads(pickle.dumps(pack(step, states, sources)))
        there, their_states = unpack(wire)
        assert isinstance(there.chunks, WireDecodes)
        ours.load(step.chunks, sources or [-1] * len(rows), states)
        theirs.load(there.chunks, wire.sources or [-1] * len(rows), their_states)
        assert contents(theirs, rows) == contents(ours, rows)
        assert DecodeTraits.of(there.chunks, their_states) == DecodeTraits.of(step.chunks, states)
        assert "_chunks" not in vars(there.chunks), "an object was made of each row"
        if rng.random() < 0.3:
            theirs.load(step.chunks, sources or [-1] * len(rows), states)
            assert contents(theirs, rows) == contents(ours, rows)


def test_numbers_drawn_together_are_those_drawn_one_by_one() -> None:
    states = [SamplingState(SamplingParams(), seed) for seed in (0, 1, 2**63, 2**64 - 1, -5)]
    for ahead in ([False] * 5, [True, False, True, False, True]):
        drawn = uniforms(states, np.array(ahead)).tolist()
        assert drawn == [state.uniform(int(one)) for state, one in zip(states, ahead, strict=True)]
        for number, state in enumerate(states):
            for _ in range(number * 1000):
                state.accept(1)


def test_a_temperature_too_cold_for_fp32_still_draws() -> None:
    packed = PackedRows(1, 1, CPU)
    state = SamplingState(SamplingParams(temperature=1e-60), 0)
    packed.load(decodes(rows_of([4])), [-1], [state])
    assert packed.sampling.temperature.item() > 0


def test_a_top_k_beyond_all_numbers_of_the_device_keeps_all() -> None:
    packed = PackedRows(1, 1, CPU)
    packed.load(decodes(rows_of([4])), [-1], [SamplingState(SamplingParams(top_k=2**40), 0)])
    assert packed.sampling.top_k.item() == 2**31 - 1
