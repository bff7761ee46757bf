"""Ranks on CPUs that take the next step before the tokens of this one are answered, as those on GPUs do.

Their decode steps are packed as for a GPU, and run in torch on what was packed; the tokens stay with the ranks, and an
answer is ready only after some looks at it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from flexmoe.config.engine import EngineConfig
from flexmoe.engine.cuda_graph import GraphFlight
from flexmoe.engine.model_runner import ModelRunner
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.sampler import SampleOutput
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.engine.together import DecodeTraits
from flexmoe.engine.wire_rows import WireRequest
from flexmoe.engine.worker import ChildWorker, RankReport
from flexmoe.layers.forward_batch import Probe
from flexmoe.parallel.mesh import Mesh
from flexmoe.parallel.rank import main
from flexmoe.scheduling.step import ScheduledChunk, Step

MAX_ROWS = 8
_MOST_BLOCKS = 64
_LOOKS = 30


class SlowFlight(GraphFlight):
    """Its tokens are there from the start, but it does not say so at once."""

    def __init__(self, step: Step, sampled: SampleOutput) -> None:
        self.step, self._sampled, self._looks = step, sampled, 0

    @property
    def needs_host(self) -> bool:
        return False

    def landed(self) -> bool:
        self._looks += 1
        return self._looks > _LOOKS

    def wait(self) -> SampleOutput:
        return self._sampled


class AheadDecoder:
    """In the place of a GraphedDecoder. Of data ranks some may have nothing to decode."""

    max_rows = MAX_ROWS

    def __init__(self, runner: ModelRunner, mesh: Mesh) -> None:
        self._runner, self._mesh = runner, mesh
        self._latest: list[int] = []
        self._packed = PackedRows(MAX_ROWS, _MOST_BLOCKS, torch.device("cpu"))

    def launch(
        self, step: Step, states: Sequence[SamplingState], sources: Sequence[int] | None, probe: Probe | None,
        traits: DecodeTraits | None,
    ) -> SlowFlight:  # fmt: skip
        self._packed.load(step.chunks, [-1] * len(step.chunks) if sources is None else sources, states)
        chunks = [self._unpacked(row, chunk.samples) for row, chunk in enumerate(step.chunks)]
        assert [chunk.start for chunk in chunks] == [chunk.start for chunk in step.chunks]
        step = Step(chunks, step.num_decodes, [])
        if sources is not None:
            assert all(0 <= source < len(self._latest) for source in sources)
            states = [_ahead(state) for state in states]
        sampled = self._runner._run(step, states, None if traits is None else traits.rows)
        tokens = torch.tensor(sampled.token_ids or [0] * len(step.chunks))
        self._latest = self._mesh.tp.broadcast(tokens, 0, "tokens").tolist()
        return SlowFlight(step, sampled)

    def _unpacked(self, row: int, samples: bool) -> ScheduledChunk:
        """What the device is told of a row, as a chunk."""
        rows = self._packed.rows
        source, start, stride = int(rows.sources[row]), int(rows.lengths[row]) - 1, int(rows.table_stride)
        token = int(rows.token_ids[row]) if source < 0 else self._latest[source]
        blocks = rows.tables[row * stride :][: start // self._runner.cache.block_size + 1].tolist()
        return ScheduledChunk(WireRequest(start, [token], blocks, contiguous=False), start, 1, samples)


def _ahead(state: SamplingState) -> SamplingState:
    """The state as it is after one more token."""
    number, frozen = state.uniform(ahead=1), copy.copy(state)
    vars(frozen)["uniform"] = lambda: number
    return frozen


class AheadWorker(ChildWorker):
    """A Worker with such a decoder."""

    def start(self, options: EngineConfig) -> RankReport:
        report = super().start(options)
        assert self.runner is not None
        assert self.mesh is not None
        self.runner._graphed = AheadDecoder(self.runner, self.mesh)  # type: ignore[assignment]
        return replace(report, max_ahead=MAX_ROWS)


def run() -> None:
    main(AheadWorker, sys.argv[1:])
