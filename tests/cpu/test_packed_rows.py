"""The packed inputs of a decode step: every field arrives, whatever the number of rows and the length of tables."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.scheduler import ScheduledChunk
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
    first, second = rows_of([5, 9])
    state = SamplingState(SamplingParams(temperature=1.0), 3)
    packed = PackedRows(2, 1, CPU)
    chunks = [ScheduledChunk(second, 9, 1, True), ScheduledChunk(first, 5, 1, True)]
    packed.load(chunks, [1, 0], [state, state])
    assert packed.rows.sources.tolist() == [1, 0]
    assert packed.rows.lengths.tolist() == [10, 6]
    assert packed.sampling.uniform.tolist() == [state.uniform(ahead=1)] * 2


def test_a_temperature_too_cold_for_fp32_still_draws() -> None:
    packed = PackedRows(1, 1, CPU)
    state = SamplingState(SamplingParams(temperature=1e-60), 0)
    packed.load(decodes(rows_of([4])), [-1], [state])
    assert packed.sampling.temperature.item() > 0


def test_a_top_k_beyond_all_numbers_of_the_device_keeps_all() -> None:
    packed = PackedRows(1, 1, CPU)
    packed.load(decodes(rows_of([4])), [-1], [SamplingState(SamplingParams(top_k=2**40), 0)])
    assert packed.sampling.top_k.item() == 2**31 - 1
