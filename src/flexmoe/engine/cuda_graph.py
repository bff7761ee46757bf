"""Decode steps as CUDA graphs, one for each batch bucket. Enters: a step. Leaves: a flight.

A step is launched with one copy of its inputs and one graph, and its tokens come back when the flight is waited for.
They also stay on the device, so that the next step can be launched before the host has seen them. What a step computes
beside its decodes, prompts, is launched behind their graph, and its tokens join theirs.

Ranks launch the same steps in the same order, and what sets graphs apart is the same on all of them; so they also
capture together, each after it has computed the step once without a graph, which opens what NCCL needs. The collectives
are in the graph. Data ranks have rows of their own, and are told what all have in common (`engine/together.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexmoe.config.engine import MAX_ROWS
from flexmoe.engine.device import to_device
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.sampler import SampleOutput, Sampler, SamplingState
from flexmoe.engine.together import DecodeTraits
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.device_rows import DeviceDecoder, Sampling
from flexmoe.moe.load import ExpertCounter
from flexmoe.parallel.comm import Traffic
from flexmoe.scheduling.step import ScheduledChunk, Step

# Rows are padded to the next of these. Small steps are exact: at batch 3 a fourth row would read experts of its own.
_BUCKETS: tuple[int, ...] = (
    *range(1, 9),
    *range(12, 33, 4),
    *range(40, 65, 8),
    *range(80, 129, 16),
    *range(160, 257, 32),
    *range(320, MAX_ROWS + 1, 64),
)
_LONG = 1024  # keys of a row from which attention is cut finer
_LANDED = 3  # host buffers for tokens: two steps may be on their way while a third is read


@dataclass(frozen=True, slots=True)
class _Form:
    """What sets one graph apart from another: rows, whether any looks back far, how it chooses."""

    bucket: int
    long: bool
    draws: bool
    filtered: bool


def bucket_of(rows: int) -> int:
    """The number of rows that a step of `rows` is padded to."""
    return next(size for size in _BUCKETS if size >= rows)


def buckets_up_to(rows: int) -> list[int]:
    """The numbers of rows that steps of up to so many are padded to."""
    return [size for size in _BUCKETS if size <= rows]


def rows_for(max_num_seqs: int) -> int:
    """Room for rows that a decoder needs for steps of so many sequences."""
    return bucket_of(min(max_num_seqs, MAX_ROWS))


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, and the bytes that this rank sends in it, by label."""

    graph: torch.cuda.CUDAGraph
    sent: dict[str, float]
    traffic: Traffic

    def replay(self) -> None:
        """Launch it, and count what it sends."""
        self.traffic.repeat(self.sent)
        self.graph.replay()


class GraphPool:
    """Captures graphs that share memory, since one of them runs at a time."""

    def __init__(self, device: torch.device, traffic: Traffic | None = None) -> None:
        """traffic: where the collectives of what is captured are counted."""
        self._stream = torch.cuda.Stream(device)
        self._traffic = traffic or Traffic()
        self._memory: Any = None

    def capture(self, work: Callable[[], None]) -> Captured:
        """A graph of what `work` launches. It must have run before: compiling is no part of a graph."""
        graph = torch.cuda.CUDAGraph()
        # On a stream of its own, and heedless of other threads: their work on the GPU may go on meanwhile.
        where = torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local")
        with self._traffic.aside() as sent, where:
            work()
        self._memory = self._memory or graph.pool()
        return Captured(graph, sent, self._traffic)


class GraphFlight:
    """A launched step. Its tokens are on the device in the order of its rows; `wait` brings them to the host."""

    def __init__(self, step: Step, tokens: Tensor, logits: Tensor, host_states: Sequence[SamplingState]) -> None:
        """tokens: pinned [n], written once `landed` has happened. host_states: of all rows if the host must sample."""
        self.step = step
        self._tokens, self._logits, self._host_states = tokens, logits, host_states
        self._landed = torch.cuda.Event()
        self._landed.record()

    @property
    def needs_host(self) -> bool:
        """Whether the host samples: then no step may be launched before `wait` has returned."""
        return bool(self._host_states)

    def landed(self) -> bool:
        """Whether `wait` would return at once."""
        return bool(self._landed.query())

    def wait(self) -> SampleOutput:
        """The tokens; NO_TOKEN where the logits of a row are not numbers."""
        if self._host_states:
            return Sampler().sample(self._logits, self._host_states)
        self._landed.synchronize()
        token_ids: list[int] = self._tokens.tolist()
        return SampleOutput(token_ids, [None] * len(token_ids))


class GraphedDecoder:
    """Launches decode steps of a DeviceDecoder on one cache."""

    def __init__(
        self,
        model: DeviceDecoder,
        cache: KVCache,
        most_blocks: int,
        device: torch.device,
        traffic: Traffic | None = None,
    ) -> None:
        """traffic: where the model's collectives are counted."""
        self._model, self._cache, self._most_blocks, self._device = model, cache, most_blocks, device
        self._packed: dict[int, PackedRows] = {}
        self._graphs: dict[_Form, Captured] = {}
        self._pool = GraphPool(device, traffic)
        self._tokens = [torch.zeros(self.max_rows, dtype=torch.int64, pin_memory=True) for _ in range(_LANDED)]
        self._turn = 0

    @property
    def max_rows(self) -> int:
        """Decodes that one step can have."""
        return len(self._model.sampled)

    @torch.inference_mode()
    def launch(
        self,
        step: Step,
        states: Sequence[SamplingState],
        sources: Sequence[int] | None = None,
        probe: Probe | None = None,
        traits: DecodeTraits | None = None,
    ) -> GraphFlight:
        """Start a step of decodes.

        sources: if the tokens of the step before are not known to the host yet, of each chunk's token its place among
        them, or -1. probe: counts experts, or sees the tensors of the step, which then runs without a graph. traits: of
        all data ranks' decodes, if there are several; then this one may have none, and a probe only counts.
        """
        own = DecodeTraits.of(step.chunks, states)
        self._compute(step.chunks, () if own.on_host else states, sources, probe, traits or own)
        return self._fly(step, len(step.chunks), states if own.on_host else ())

    @torch.inference_mode()
    def launch_mixed(
        self,
        step: Step,
        states: Sequence[SamplingState],
        sources: Sequence[int] | None,
        decodes: int,
        others: Callable[[], Tensor | None],
    ) -> GraphFlight:
        """Start a step whose tokens the device chooses: the first `decodes` chunks by a graph, the rest by `others`.

        sources: as for `launch`. others: gives the tokens of what it launched, [n] on the device; None if it has none.
        """
        if decodes:
            first = step.chunks[:decodes], states[:decodes]
            self._compute(*first, sources, None, DecodeTraits.of(*first))
        tokens = others()
        if tokens is not None:
            self._model.sampled[decodes : decodes + len(tokens)].copy_(tokens)
        return self._fly(step, len(states), ())

    @torch.inference_mode()
    def record(self, states: Sequence[SamplingState], *, long: bool) -> None:
        """The graph of steps of such states, unless it is there; by a step of padding alone. No step may be under way.

        long: of steps that look far back.
        """
        traits = replace(DecodeTraits.of((), states), furthest=_LONG * long)
        form = self._form(bucket_of(len(states)), traits)
        if form not in self._graphs:
            packed = self._inputs(form.bucket)
            packed.load((), (), ())
            self._run(form, packed, None)

    @torch.inference_mode()
    def tokens_of(self, sources: Sequence[int]) -> Tensor:
        """On the device, of the step launched last the tokens with these places, -1 where that is -1: int64 [n]."""
        places = to_device(torch.tensor(sources, dtype=torch.int64), self._device)
        return torch.where(places >= 0, self._model.sampled[places.clamp(min=0)], -1)

    def _compute(
        self,
        chunks: Sequence[ScheduledChunk],
        sampled: Sequence[SamplingState],
        sources: Sequence[int] | None,
        probe: Probe | None,
        traits: DecodeTraits,
    ) -> None:
        """Launch these decodes. sampled: their states if the device samples them, else nothing."""
        counter = probe if isinstance(probe, ExpertCounter) else None
        probe = None if counter is not None else probe
        count = len(chunks)
        if probe is None:
            packed = self._inputs(bucket_of(traits.rows))
        else:  # which shall see no padding; any number of rows may come, so that these are not kept
            packed = PackedRows(count, self._most_blocks, self._device)
        packed.load(chunks, [-1] * count if sources is None else sources, sampled)
        self._run(self._form(packed.bucket, traits), packed, probe)
        if counter is not None and count:  # an idle data rank makes no pass
            self._model.count(packed.bucket, counter)
            counter.passed(count)

    def _form(self, bucket: int, traits: DecodeTraits) -> _Form:
        # Where the host samples from logits that ranks have to put together, as if one drew.
        draws = traits.draws or (self._model.spread and traits.on_host)
        return _Form(bucket, traits.furthest >= _LONG, draws, traits.filtered)

    def _fly(self, step: Step, count: int, host_states: Sequence[SamplingState]) -> GraphFlight:
        """Send the first `count` tokens chosen on their way to the host."""
        self._turn = (self._turn + 1) % _LANDED
        tokens = self._tokens[self._turn][:count]
        tokens.copy_(self._model.sampled[:count], non_blocking=True)
        return GraphFlight(step, tokens, self._model.logits[:count], host_states)

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
            self._graphs[form] = self._pool.capture(lambda: self._step(form, packed, None))

    def _step(self, form: _Form, packed: PackedRows, probe: Probe | None) -> None:
        sampling = Sampling(packed.sampling, form.filtered) if form.draws else None
        self._model.step(packed.rows, sampling, self._cache, probe, long=form.long)
