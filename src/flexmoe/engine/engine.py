"""Engine: the heart. add_request() queues, step() computes one forward pass for everything that runs, abort() ends.

    schedule -> launch -> wait -> update -> read: which tokens, what they are, who finished, what the text says.

Where the runner can, the next step is launched before the tokens of this one are known, so that the device does not
wait for Python. What it computes for requests that end in between is thrown away.

One engine is used by one thread at a time. It keeps nothing outside of itself: two can live in one process.

Ctrl-C may come between any two instructions. While the model computes it does no harm: the step does not count, nor
does the one launched behind it, which is given up (why that is safe stands in scheduling.scheduler). But
bookkeeping that it cuts short may have left a block with two owners, so then all requests end and the cache is empty.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from flexmoe.config.engine import EngineConfig
from flexmoe.config.routing import LayerLoad
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.admission import Admission
from flexmoe.engine.chat_template import ChatTemplate
from flexmoe.engine.compile_ahead import compiling_ahead
from flexmoe.engine.device import tokens_on
from flexmoe.engine.drift import Drift, Predict
from flexmoe.engine.grammar import Grammars
from flexmoe.engine.launched import Launched
from flexmoe.engine.metrics import EngineMetrics
from flexmoe.engine.model_runner import ModelRunner
from flexmoe.engine.outputs import RequestOutput
from flexmoe.engine.ranks import RankedRunner, StartedRanks, start_ranks
from flexmoe.engine.record_ahead import RecordingAhead
from flexmoe.engine.sampler import SampleOutput
from flexmoe.engine.startup import Started, start
from flexmoe.engine.tracking import Sample, Tracked
from flexmoe.errors import ConfigError, EngineError, FlexMoEError, RequestError
from flexmoe.parallel.supervisor import Supervisor
from flexmoe.scheduling.block_manager import BlockManager
from flexmoe.scheduling.data_ranks import DataRanks, scheduler_for
from flexmoe.scheduling.scheduler import Scheduler
from flexmoe.scheduling.step import Step

_log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Engine:
    """Runs a model for many requests at once."""

    def __init__(self, options: EngineConfig, ranks: Supervisor | None = None, predict: Predict | None = None) -> None:
        """ranks: processes to use, if the plan has several ranks; they outlive the engine. None: it starts its own.

        predict: what each step should take, to compare with what it takes.
        """
        self.options = options
        self.scheduler: Scheduler | DataRanks
        self._started: Started | StartedRanks
        self.runner: ModelRunner | RankedRunner
        if options.parallel.num_ranks > 1:
            self._started, self.runner = start_ranks(options, ranks)
        else:
            self._started = started = start(options)
            self.runner = ModelRunner(
                started.model, started.cache, started.device, started.graphed, started.prompts,
                one_pass=options.device.one_pass, prompts_ahead=options.device.prompts_ahead,
            )  # fmt: skip
        self.config = self._started.config
        self.tokenizer = self._started.tokenizer
        self.metrics = EngineMetrics()
        self.drift: Drift | None = None
        self._start_anew()
        self._compiling = compiling_ahead(self._started, options, self.scheduler.max_tokens)
        device, tokens = options.device, self.scheduler.max_tokens
        self._recording = RecordingAhead(self._started, tokens, wanted=device.compile_ahead, one_pass=device.one_pass)
        self._numbers = itertools.count()
        self._closed = False

    def _start_anew(self) -> None:
        cache = self.options.cache
        blocks = [
            BlockManager(self._started.num_blocks, cache.block_size, cache.enable_prefix_caching)
            for _ in range(self.options.parallel.data_parallel_size)
        ]
        s, limits = self._started, self.options.scheduler.on(self._started.device.type)
        tokens = tokens_on(s.device, s.config, s.dtype, local=self.local_device is not None)
        self.scheduler = scheduler_for(limits, blocks, tokens, one_pass=self.options.device.one_pass)
        self._tracked: dict[str, Tracked] = {}
        self._owner: dict[str, tuple[Tracked, Sample]] = {}  # by the id of a sample's sequence
        self._ahead: Launched | None = None  # the next step, if it is being computed already
        self._landed = 0.0  # when the latest step was over

    @property
    def has_unfinished(self) -> bool:
        return bool(self._tracked)

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output may have together: the model's context, or less if the KV cache is smaller."""
        self._check_open()
        return self.admission.max_model_len

    @cached_property
    def admission(self) -> Admission:
        """What requests must be to be served."""
        tokenizer, config = self.tokenizer, self.config
        grammars = None if tokenizer is None else Grammars(tokenizer, config.vocab_size, config.eos_token_ids)
        limits = self._started.max_model_len, self.scheduler.num_tokens
        stages = self.options.parallel.pipeline_parallel_size
        return Admission(config, tokenizer, grammars, self.options.seed, *limits, stages)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """How conversations become prompts. Raises RequestError if the model has no tokenizer."""
        self._check_open()
        folder = self._started.source.folder
        if folder is None or self.tokenizer is None:
            raise RequestError("this model has no tokenizer, so no chat template; give prompts as lists of token ids.")
        return ChatTemplate.from_folder(folder, self.tokenizer.special_tokens)

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        stream: bool = False,
    ) -> str:
        """Queue a prompt and return its id. stream: step() then reports it after every step, not only at its end.

        Raises RequestError for a prompt that is empty, too long or holds unknown ids; nothing is queued then.
        """
        self._check_open()
        ids = self.admission.check(prompt_token_ids, sampling)
        request_id = request_id or self.new_id()
        number = next(self._numbers)
        samples = [self.admission.sample(request_id, number, i, ids, sampling) for i in range(sampling.n)]
        for sample in samples:
            sample.request.watched = stream
            if sample.request.request_id in self._owner:
                raise RequestError(f"request_id={sample.request.request_id!r} is still being served; use another id.")
        self._whole(self._queue, Tracked(request_id, prompt, ids, sampling, stream, samples))
        return request_id

    def new_id(self) -> str:
        """An id that no request has had yet, unless it was made up by somebody else."""
        return f"request-{next(self._numbers)}"

    def step(self, *, report: bool = True) -> list[RequestOutput]:
        """Compute one step. Returns the outputs of the requests that finished, and of those that stream.

        report: False leaves out those that stream and go on, unless it is their first output. Their text is made when
        it is asked for, so that this saves work.

        If it raises, nothing of the step counts: the next one computes it again, or abort() ends its requests.
        """
        self._check_open()
        current, self._ahead = self._ahead, None
        current = current or self._launch(self._whole(self.scheduler.schedule))
        if current is None:
            return []
        following = self._launch_behind(current)
        self.scheduler.expect(current.step)
        sampled = self._land(current)
        outputs = self._whole(self._advance, current, sampled, report)
        self._ahead = following if following is not None and following.wanted else None
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and return what it has so far; None if it is not being served."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return None
        self._whole(self._drop, tracked)
        for sample in tracked.samples:
            sample.read()
        return tracked.output()

    def discard(self, request_ids: Iterable[str]) -> None:
        """End those of the requests that are being served; nobody wants what they have."""
        for request_id in request_ids:
            if request_id in self._tracked:
                self._whole(self._drop, self._tracked[request_id])

    def serves(self, request_id: str) -> bool:
        """Whether this request is waiting or running."""
        return request_id in self._tracked

    def prepare(self) -> bool:
        """Record a graph for requests to come. False: there is none to record now. Does nothing while any is served."""
        return not (self._closed or self.has_unfinished or self._compiling.busy) and self._recording.record()

    def close(self) -> None:
        """Discard what runs and let go of model and cache. May be called twice."""
        if not self._closed:
            self._compiling.close()
            self.discard(list(self._tracked))
            self._closed, self._ahead, runner = True, None, self.runner
            del self.runner, self._started, self._recording
            if isinstance(runner, RankedRunner):
                runner.close()

    def describe(self) -> dict[str, Any]:
        """What the engine runs with; printed at start."""
        self._check_open()
        s = self._started
        return {
            "model": s.source.name,
            "architecture": self.config.architecture,
            "parameters": self.config.num_parameters(),
            "active_parameters": self.config.num_active_parameters(),
            "device": str(s.device),
            "dtype": str(s.dtype).removeprefix("torch."),
            "quantization": s.quantization,
            "threads": s.threads,
            "expert_backend": s.backend,
            "decode_kernels": s.decode_kernels,
            "prompt_kernels": s.prompt_kernels,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.options.scheduler.on(s.device.type).seats,
            "max_num_batched_tokens": self.scheduler.max_tokens,
            "kv_cache_blocks": s.num_blocks,
            "block_size": self.options.cache.block_size,
            "kv_cache_bytes": s.cache.num_bytes,
            "prefix_caching": self.options.cache.enable_prefix_caching,
            "one_pass": self.options.device.one_pass,
            "prompts_ahead": self.runner.mixes_ahead,
        } | (self.options.parallel.to_json() if self.options.parallel.num_ranks > 1 else {})

    def count_experts(self, on: bool) -> None:
        """Count from the next launch on which experts tokens choose, or no more.

        Raises ConfigError for a model without experts, EngineError if a trace or another recording is at work.
        """
        self._check_open()
        if self.config.moe is None:
            raise ConfigError(f"{self.config.architecture} has no experts, so no routing to record.")
        self.runner.count_experts(on)

    def expert_loads(self) -> list[LayerLoad]:
        """What was counted since `count_experts(True)`, by MoE layer."""
        self._check_open()
        return self.runner.expert_loads(self._started.source.name)

    def watch(self, predict: Predict) -> None:
        """Compare from now on what each step takes with its prediction."""
        self.drift = Drift(predict)

    @property
    def local_runner(self) -> ModelRunner:
        """The runner of a model in this process. Raises ConfigError if the model is spread over several."""
        if isinstance(self.runner, RankedRunner):
            raise ConfigError("this looks into a model of one process; use degrees of parallelism of 1.")
        return self.runner

    @property
    def model_folder(self) -> Path | None:
        """Where the model's weights are; None for random ones."""
        return self._started.source.folder if self.options.load.load_format != "dummy" else None

    @property
    def local_device(self) -> torch.device | None:
        """The device of a model in this process; None if it is spread over several."""
        return None if isinstance(self.runner, RankedRunner) else self.runner.device

    def check(self) -> None:
        """Raise the error that ended the engine's processes, if one did. Cheap."""
        self._check_open()
        if isinstance(self.runner, RankedRunner):
            self.runner.ranks.check()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed; make a new one.")

    def _whole(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do some bookkeeping; see the module's text for why it may not be cut short."""
        try:
            return work(*args, **kwargs)
        except KeyboardInterrupt:
            self._start_anew()
            raise

    def _queue(self, tracked: Tracked) -> None:
        for sample in tracked.samples:
            self.scheduler.add(sample.request)  # all samples are alike: the first is refused, or none
            self._owner[sample.request.request_id] = (tracked, sample)
        self._tracked[tracked.request_id] = tracked

    def _launch(self, step: Step, after: Launched | None = None) -> Launched | None:
        if not step.chunks:
            return None
        owners = [self._owner[chunk.request.request_id] for chunk in step.chunks]
        now = time.monotonic()
        self.metrics.launched(owners, len(step.preempted), now)
        samples = [owner for owner, chunk in zip(owners, step.chunks, strict=True) if chunk.samples]
        states = [sample.state for _, sample in samples]
        flight = self.runner.launch(step, states, after=None if after is None else after.flight)
        return Launched(step, samples, now, flight)

    def _launch_behind(self, current: Launched) -> Launched | None:
        """The step behind the current one, launched already, if runner and scheduler see a way."""
        runner = self.runner
        if not runner.can_run_ahead(current.step, current.states):
            return None
        if (step := self._whole(self.scheduler.schedule_ahead, current.step, prompts=runner.mixes_ahead)) is None:
            return None
        # A newcomer may need the host. Then the step is given up, and chosen anew when its time has come.
        states = [self._owner[chunk.request.request_id][1].state for chunk in step.chunks if chunk.samples]
        return self._launch(step, current) if runner.can_run_ahead(step, states) else None

    def _land(self, launched: Launched) -> SampleOutput:
        """Wait for a step's tokens, and tell the scheduler how long the device was at it."""
        sampled = launched.flight.wait()
        now = time.monotonic()
        self.scheduler.observe(launched.step, now - max(launched.since, self._landed))
        if self.drift is not None:
            self.drift.add(launched.step, launched.since, now)
        self._landed = now
        return sampled

    def _advance(self, launched: Launched, sampled: SampleOutput, report: bool) -> list[RequestOutput]:
        """Give each sample its token, but for those that ended while it was computed."""
        going = []
        for (tracked, sample), token, logprobs, routing in zip(
            launched.samples, sampled.token_ids, sampled.logprobs, sampled.all_routing(), strict=True
        ):
            if sample.finished:
                continue
            going.append((tracked, sample))
            try:
                sample.take(token, logprobs, routing)
            except Exception as error:  # noqa: BLE001 - it ends the request, and is told to its caller
                self._fail(tracked, error)
        self.scheduler.update(launched.step, sampled.token_ids)
        return self._read(going, report)

    def _read(self, samples: Sequence[tuple[Tracked, Sample]], report: bool) -> list[RequestOutput]:
        """Bring the texts of these up to date, end those that met a stop string, collect outputs."""
        now = time.monotonic()
        touched: dict[str, Tracked] = {}  # those of which more than a token is to be kept, each once
        for tracked, sample in samples:
            if tracked.error is None:
                self.metrics.token(tracked, sample, now)
            if sample.finished or tracked.wanted(report) or tracked.sampling.stop:
                touched[tracked.request_id] = tracked
                if tracked.error is None:
                    self._read_text(tracked, sample)
        return [tracked.report() for tracked in touched.values() if self._is_due(tracked, report)]

    def _is_due(self, tracked: Tracked, report: bool) -> bool:
        """Whether its caller wants an output now; a request that is over is forgotten."""
        if not tracked.finished:
            return tracked.wanted(report)
        tracked.end = time.monotonic()
        self._forget(tracked)
        return True

    def _read_text(self, tracked: Tracked, sample: Sample) -> None:
        try:
            stop = sample.read()
        except Exception as error:  # noqa: BLE001 - it ends the request, and is told to its caller
            self._fail(tracked, error)
        else:
            if stop is not None:
                self.scheduler.finish(sample.request, "stop", stop)

    def _fail(self, tracked: Tracked, error: Exception) -> None:
        """End one request that cannot go on; the others do not notice."""
        if not isinstance(error, FlexMoEError):
            _log.error("request %s fails", tracked.request_id, exc_info=error)
        tracked.error = f"request {tracked.request_id!r} failed: {str(error) or type(error).__name__}"
        for sample in tracked.samples:
            if not sample.finished:
                self.scheduler.finish(sample.request, "error")

    def _drop(self, tracked: Tracked) -> None:
        for sample in tracked.samples:
            self.scheduler.abort(sample.request.request_id)
        self._forget(tracked)
        if self._ahead is not None and not self._ahead.wanted:
            self._ahead = None

    def _forget(self, tracked: Tracked) -> None:
        self.metrics.ended(tracked, time.monotonic())
        del self._tracked[tracked.request_id]
        for sample in tracked.samples:
            del self._owner[sample.request.request_id]
