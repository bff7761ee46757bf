"""Decode steps as CUDA graphs, one for each batch bucket. Enters: a step of decodes. Leaves: a flight.

A step is launched with one copy of its inputs and one graph, and its tokens come back when the flight is waited for.
They also stay on the device, so that the next step can be launched before the host has seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.sampler import SampleOutput, Sampler, SamplingState
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.device_rows import MAX_ROWS, DeviceDecoder, Sampling
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.scheduler import Step

# Rows are padded to the next of these. Small steps are exact: at batch 3 a fourth row would read experts of its own.
_BUCKETS: tuple[int, ...] = (
    *range(1, 9),
    *range(12, 33, 4),
    *range(40, 65, 8),
    *range(80, 129, 16),
    *range(160, MAX_ROWS + 1, 32),
)
_LONG = 1024  # keys of a row from which attention is cut finer
_LANDED = 3  # host buffers for tokens: two steps may be on their way while a third is read


@dataclass(frozen=True, slots=True)
class _Form:
    """What sets one graph apart from another: rows, whether any looks back far, how tokens are chosen."""

    bucket: int
    long: bool
    draws: bool
    filtered: bool


def bucket_of(rows: int) -> int:
    """The number of rows that a step of `rows` is padded to."""
    return next(size for size in _BUCKETS if size >= rows)


class GraphFlight:
    """A launched step. Its tokens are on the device in the order of its rows; `wait` brings them to the host."""

    def __init__(self, step: Step, tokens: Tensor, logits: Tensor, host_states: Sequence[SamplingState]) -> None:
        """tokens: pinned [n], written once `landed` has happened. host_states: of all rows if the host must sample."""
        self.step = step
        self._tokens, self._logits, self._host_states = tokens, logits, host_states
        self._landed = torch.cuda.Event()
        self._landed.record()

    def row_of(self) -> dict[Request, int]:
        """Each request's row."""
        return {chunk.request: row for row, chunk in enumerate(self.step.chunks)}

    def wait(self) -> SampleOutput:
        """The tokens; NO_TOKEN where the logits of a row are not numbers."""
        if self._host_states:
            return Sampler().sample(self._logits, self._host_states)
        self._landed.synchronize()
        token_ids: list[int] = self._tokens.tolist()
        return SampleOutput(token_ids, [None] * len(token_ids))


class GraphedDecoder:
    """Launches decode steps of a DeviceDecoder on one cache."""

    def __init__(self, model: DeviceDecoder, cache: KVCache, most_blocks: int, device: torch.device) -> None:
        self._model, self._cache, self._most_blocks, self._device = model, cache, most_blocks, device
        self._packed: dict[int, PackedRows] = {}
        self._graphs: dict[_Form, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None  # of memory, shared by the graphs: one runs at a time
        self._tokens = [torch.zeros(MAX_ROWS, dtype=torch.int64, pin_memory=True) for _ in range(_LANDED)]
        self._turn = 0

    @property
    def max_rows(self) -> int:
        """Decodes that one step can have."""
        return MAX_ROWS

    @torch.inference_mode()
    def launch(
        self,
        step: Step,
        states: Sequence[SamplingState],
        after: GraphFlight | None = None,
        probe: Probe | None = None,
    ) -> GraphFlight:
        """Start a step of decodes. after: the step before, if its tokens are not known to the host yet.

        probe: sees the tensors of the step, which then runs without a graph.
        """
        count = len(step.chunks)
        packed = self._inputs(bucket_of(count) if probe is None else count)  # a probe shall see no padding
        rows = {} if after is None else after.row_of()
        sources = [rows.get(chunk.request, -1) for chunk in step.chunks]
        on_device = all(state.device_ready for state in states)
        packed.load(step.chunks, sources, states if on_device else (), ahead=int(after is not None))
        form = _Form(packed.bucket, max(chunk.start for chunk in step.chunks) >= _LONG, *_sampled(states, on_device))
        self._run(form, packed, probe)
        self._turn = (self._turn + 1) % _LANDED
        tokens = self._tokens[self._turn][:count]
        tokens.copy_(self._model.sampled[:count], non_blocking=True)
        return GraphFlight(step, tokens, self._model.logits[:count], () if on_device else states)

    def _inputs(self, bucket: int) -> PackedRows:
        if bucket not in self._packed:
            self._packed[bucket] = PackedRows(bucket, self._most_blocks, self._device)
        return self._packed[bucket]

    def _run(self, form: _Form, packed: PackedRows, probe: Probe | None) -> None:
        if probe is None and form in self._graphs:
            self._graphs[form].replay()
            return
        # Once without a graph: kernels are compiled and memory is allocated, and this step's work is done.
        self._step(form, packed, probe)
        if probe is None:
            self._graphs[form] = self._capture(form, packed)

    def _capture(self, form: _Form, packed: PackedRows) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # On a stream of its own, and heedless of other threads: their work on the GPU may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._step(form, packed, None)
        self._pool = self._pool or graph.pool()
        return graph

    def _step(self, form: _Form, packed: PackedRows, probe: Probe | None) -> None:
        sampling = Sampling(packed.sampling, form.filtered) if form.draws else None
        self._model.step(packed.rows, sampling, self._cache, probe, long=form.long)


def _sampled(states: Sequence[SamplingState], on_device: bool) -> tuple[bool, bool]:
    """Whether any row draws its token on the device, and whether any of these has a top_k or a top_p."""
    params = [state.params for state in states if on_device and not state.params.greedy]
    return bool(params), any(p.top_k > 0 or p.top_p < 1.0 for p in params)
