"""ModelRunner: one step on the device. Enters: a Step and the samplers' states. Leaves: sampled tokens.

A launched step is a Flight. While one is on its way the next may be launched behind it: see Engine.step.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexmoe.config.routing import LayerLoad
from flexmoe.engine.batch import build_batch, build_paged_rows, build_prompt_rows
from flexmoe.engine.choices import ChoiceTap
from flexmoe.engine.cuda_graph import GraphedDecoder, GraphFlight
from flexmoe.engine.device import computing_on
from flexmoe.engine.prompt_graphs import GraphedPrompts
from flexmoe.engine.sampler import SampleOutput, Sampler, SamplingState
from flexmoe.engine.together import DecodeTraits, Together
from flexmoe.errors import EngineError
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.native import PROMPT_ROWS, NativeDecoder
from flexmoe.moe.load import ExpertCounter
from flexmoe.scheduling.step import Step


class Flight(Protocol):
    """A step that was launched. One that nobody waits for does no harm: its keys are written again, or not read."""

    def wait(self) -> SampleOutput:
        """The sampled tokens, once they are there. Called at most once. Raises what went wrong on the device."""
        ...


@dataclass(frozen=True, slots=True)
class Landed:
    """A flight that was over when it was launched."""

    sampled: SampleOutput

    def wait(self) -> SampleOutput:
        return self.sampled


@dataclass(frozen=True, slots=True)
class TappedFlight:
    """A flight whose choices of experts are wanted."""

    flight: Flight
    tap: ChoiceTap

    def wait(self) -> SampleOutput:
        return self.tap.annotate(self.flight.wait())


class ModelRunner:
    """Owns the model and its KV cache; holds no request.

    Decodes have a path of their own where there is one, also beside prompts: on a CPU the C kernels, on a GPU the
    Triton kernels in graphs. Everything else goes through the decoder in torch.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        device: torch.device,
        graphed: GraphedDecoder | None = None,
        prompts: GraphedPrompts | None = None,
        *,
        one_pass: bool = False,
        prompts_ahead: bool = True,
    ) -> None:
        """graphed: the model's decode steps as CUDA graphs on this cache. prompts: its prompts in Triton kernels.

        one_pass: compute decodes beside prompts in the pass of these. prompts_ahead: leave the tokens of steps with
        prompts on the device, so that the next step can be launched behind them.
        """
        self.model, self.cache, self.device = model, cache, device
        self._graphed, self._prompts, self._one_pass = graphed, prompts, one_pass
        alone = model.mesh.world.size == 1  # other ranks do not know prompts' tokens
        self.mixes_ahead = prompts_ahead and graphed is not None and prompts is not None and alone
        self.probe: Probe | None = None  # sees every tensor of the following steps; see `flexmoe trace`
        self._counter: ExpertCounter | None = None  # made when it is first asked for
        self._sampler = Sampler()
        # Remembered, since a thread that is new to torch starts with what any thread set last: the 1 of `_decode`, too.
        self._threads = torch.get_num_threads()
        self._process = os.getpid()
        self._windows = sorted({layer.attention.window for layer in model.decoder_layers}, key=lambda w: w or 0)

    def count_experts(self, on: bool) -> None:
        """Count from now on which experts tokens choose, or no more. Raises EngineError if a probe is at work."""
        if on and self.probe is not None:
            raise EngineError("something else looks into the steps already, a trace or a recording; end that first.")
        if not on:
            self.probe = None
            return
        if self._counter is None:
            self._counter = ExpertCounter(self.model.config, self.device)
        self._counter.reset()
        self.probe = self._counter

    def expert_loads(self, model: str) -> list[LayerLoad]:
        """What was counted since `count_experts`, under the model's name."""
        assert isinstance(self.probe, ExpertCounter)
        return self.probe.loads(model)

    def can_run_ahead(self, step: Step, states: Sequence[SamplingState]) -> bool:
        """Whether the step behind this one can be launched before this one's tokens are known.

        step: launched just now with these states, not waited for. The decodes of the step behind it are of requests
        that `step` samples for, or whose tokens are known. Only with mixes_ahead may it, or `step`, compute prompts.
        """
        graphed = self._graphed
        if graphed is None or not (decodes_only(step, graphed.max_rows) or self._flies_mixed(step, states)):
            return False
        ready = all(state.device_ready and not state.wants_routing for state in states)
        return ready and self.probe in (None, self._counter)

    def _flies_mixed(self, step: Step, states: Sequence[SamplingState]) -> bool:
        """Whether a step with prompts leaves its tokens on the device."""
        graphed = self._graphed
        if graphed is None or not self.mixes_ahead or self.probe is not None:
            return False
        fits = len(states) <= graphed.max_rows
        return fits and all(state.device_ready and not state.wants_routing for state in states)

    def launch(self, step: Step, states: Sequence[SamplingState], *, after: Flight | None = None) -> Flight:
        """Begin to compute a step; see `run`. Steps take effect on the cache in the order of their launches.

        Blocks and tokens of the requests are read before this returns; they may change before the flight is waited for.

        after: the flight launched last, if its tokens are not known yet and can_run_ahead was true of it. Then a decode
        may be the token that `after` samples for its request, which the host does not know: chunk.start is
        len(request.token_ids), and a draw uses state.uniform(ahead=1).
        """
        assert after is None or isinstance(after, GraphFlight)
        return self.launch_rows(step, states, None if after is None else rows_before(step, after.step))

    def launch_rows(
        self,
        step: Step,
        states: Sequence[SamplingState],
        sources: Sequence[int] | None,
        together: Together | None = None,
    ) -> Flight:
        """As `launch`; sources: instead of `after`, which of its tokens each decode continues.

        together: what data ranks know of each other, if there are several; this one's part may be empty.
        """
        graphed = self._graphed
        if graphed is not None and self._is_graph(graphed, step, together):
            self._check_process()
            with computing_on(self.device):
                return self._decode(step, states, sources, None if together is None else together.decodes)
        if graphed is not None and self._flies_mixed(step, states):
            self._check_process()
            with computing_on(self.device):
                return self._launch_mixed(graphed, step, states, sources)
        assert sources is None, "can_run_ahead was false"
        with computing_on(self.device):
            return Landed(self.run(step, states, None if together is None else together.most_rows))

    def _is_graph(self, graphed: GraphedDecoder, step: Step, together: Together | None) -> bool:
        """Whether the step is of decodes that graphs take; of data ranks all say the same."""
        if together is None:
            return decodes_only(step, graphed.max_rows)
        decodes = together.decodes
        return decodes is not None and decodes.rows <= graphed.max_rows and self.probe in (None, self._counter)

    def run(self, step: Step, states: Sequence[SamplingState], most_rows: int | None = None) -> SampleOutput:
        """Compute the step's rows, write their keys and values, sample where a chunk asks for it.

        states: one for each chunk that samples, in order. most_rows: of any data rank in this step; None: there is one.

        Decodes and prompts are two passes, unless one_pass is asked for: otherwise a request's rounding, in bf16 its
        tokens too, would depend on whether another one's prompt is computed in the same step. Measured on a CPU, the
        two passes take as long as one; on a GPU the second reads most weights again. Data ranks take one, if any of
        them has prompts. What torch computes, decodes beyond `max_rows` and many prompts, is rounded as the shape of
        its products will have it; in fp32 that has not been seen to change a token.
        """
        self._check_process()
        decodes, path = step.num_decodes, self._graphed or self.model.native
        together = self._one_pass and decodes < len(step.chunks)
        if path is None or most_rows is not None or together or not 0 < decodes <= path.max_rows:
            return self._run(step, states, most_rows)
        flight = self._decode(Step(step.chunks[:decodes], decodes, []), states[:decodes])
        if decodes == len(step.chunks):
            return flight.wait()
        others = self._run(Step(step.chunks[decodes:], 0, []), states[decodes:])  # launched while decodes run
        return flight.wait().plus(others)

    def _check_process(self) -> None:
        """A fork has none of the threads, torch's or ours, and would wait for them for ever."""
        if os.getpid() != self._process:
            raise EngineError(
                "the engine was made before this process was forked, and cannot work in it; make it in the process "
                "that uses it, for instance with multiprocessing.get_context('spawn')."
            )

    def _decode(
        self,
        step: Step,
        states: Sequence[SamplingState],
        sources: Sequence[int] | None = None,
        traits: DecodeTraits | None = None,
    ) -> Flight:
        """A step of decodes alone, on the path that these have. sources, traits: see `GraphedDecoder.launch`."""
        tap = self._tap(step, states)
        probe = tap or self.probe
        if self._graphed is not None:
            flight = self._graphed.launch(step, states, sources, probe, traits)
            return flight if tap is None else TappedFlight(flight, tap)
        assert self.model.native is not None
        sampled = self._decode_native(self.model.native, step, states, probe)
        return Landed(sampled if tap is None else tap.annotate(sampled))

    def _tap(self, step: Step, states: Sequence[SamplingState]) -> ChoiceTap | None:
        """A look at the experts of this pass, if a row asks for it."""
        return ChoiceTap(step, states, self.probe) if any(state.wants_routing for state in states) else None

    @torch.inference_mode()
    def _decode_native(
        self, native: NativeDecoder, step: Step, states: Sequence[SamplingState], probe: Probe | None
    ) -> SampleOutput:
        with self._torch_threads_out():
            greedy = all(state.plain_greedy for state in states)
            logits = native(build_paged_rows(step, self.cache.block_size), self.cache, probe, best=greedy)
            return self._sampler.sample(logits, states)

    @contextmanager
    def _torch_threads_out(self) -> Iterator[None]:
        """Torch's threads stay out: after any work they spin for a while on the cores that the C threads need.

        Measured: 6 ms instead of 1 for a step of 8 rows, from one parallel argmax.
        """
        _use_torch_threads(1)
        try:
            yield
        finally:
            _use_torch_threads(self._threads)

    def _launch_mixed(
        self, graphed: GraphedDecoder, step: Step, states: Sequence[SamplingState], sources: Sequence[int] | None
    ) -> GraphFlight:
        """Launch decodes and prompts, one behind the other or in one pass."""
        first = 0 if self._one_pass else step.num_decodes  # chunk of the pass that is not a graph
        rest = Step(step.chunks[first:], step.num_decodes - first, [])
        before, drawing = None, states[first:]
        if sources and self._one_pass:
            before = graphed.tokens_of(sources)
            drawing = [*map(_after_pending, drawing, sources), *drawing[len(sources) :]]

        def launch() -> Tensor | None:
            logits = self._logits(rest, None, None, before)
            return self._sampler.choose(logits, drawing, self._likeliest) if len(logits) else None

        return graphed.launch_mixed(step, states, sources, first, launch)

    def _prompts_native(self, native: NativeDecoder, step: Step, probe: Probe | None) -> Tensor:
        """Logits of the chunks that sample. In pieces that bound the memory; a probe sees the step whole."""
        pieces = build_prompt_rows(step, self.cache.block_size, PROMPT_ROWS if probe is None else None)
        with self._torch_threads_out():
            logits = [native(rows, self.cache, probe) for rows in pieces]
            return torch.cat(logits)

    @torch.inference_mode()
    def _run(self, step: Step, states: Sequence[SamplingState], most_rows: int | None = None) -> SampleOutput:
        tap = self._tap(step, states)
        logits = self._logits(step, tap or self.probe, most_rows)
        if not states or not len(logits):  # nobody samples, or another rank does
            return SampleOutput([], [])
        sampled = self._sampler.sample(logits, states, self._likeliest)
        return sampled if tap is None else tap.annotate(sampled)

    @property
    def _likeliest(self) -> Tensor | None:
        """What is likeliest by the latest logits, if whoever computed them has found that, too."""
        return None if self._prompts is None else self._prompts.likeliest

    def _logits(self, step: Step, probe: Probe | None, most_rows: int | None, before: Tensor | None = None) -> Tensor:
        """Logits of the chunks that sample, [N, V]; [0, V] on ranks that do not.

        before: int64, the token of each decode that only the device knows, -1 for the others.
        """
        if self._prompts is not None:
            return self._prompts.logits(step.chunks, before, probe, most_rows)
        assert before is None, "the host lays out tokens that it knows"
        native = self.model.native
        if native is not None and native.prompts and most_rows is None:
            return self._prompts_native(native, step, probe)
        _use_torch_threads(self._threads)
        batch = build_batch(step, self.cache.block_size, self._windows, self.device, probe, most_rows)
        hidden: Tensor = self.model(batch, self.cache)
        if not step.num_samples:
            return hidden.new_empty(0, self.model.config.vocab_size)
        return self.model.logits(hidden, batch)


def _after_pending(state: SamplingState, source: int) -> SamplingState:
    """The state as it will be once the token with that place is known; itself where none is pending (-1)."""
    if source < 0:
        return state
    later = copy.copy(state)
    later.num_tokens += 1
    return later


def decodes_only(step: Step, max_rows: int) -> bool:
    """Whether a step is of decodes alone, and not too many."""
    return 0 < len(step.chunks) == step.num_decodes <= max_rows


def rows_before(step: Step, before: Step) -> list[int]:
    """Where the token of each decode stands among those that the step before samples; -1 if not there."""
    places = {chunk.request: place for place, chunk in enumerate(chunk for chunk in before.chunks if chunk.samples)}
    return [places.get(chunk.request, -1) for chunk in step.chunks[: step.num_decodes]]


def _use_torch_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
