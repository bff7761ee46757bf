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
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

from flexmoe.config.engine import EngineConfig
from flexmoe.config.routing import LayerLoad
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.chat_template import ChatTemplate
from flexmoe.engine.detokenizer import Detokenizer
from flexmoe.engine.model_runner import Flight, ModelRunner
from flexmoe.engine.outputs import RequestOutput
from flexmoe.engine.ranks import RankedRunner, StartedRanks, start_ranks
from flexmoe.engine.sampler import SampleOutput, SamplingState
from flexmoe.engine.startup import Started, start
from flexmoe.engine.tracking import Sample, Tracked
from flexmoe.errors import ConfigError, EngineError, RequestError
from flexmoe.parallel.supervisor import Supervisor
from flexmoe.scheduling.block_manager import BlockManager
from flexmoe.scheduling.data_ranks import DataRanks
from flexmoe.scheduling.request import Request, RequestStatus
from flexmoe.scheduling.scheduler import Scheduler, Step

# Keep apart the seeds of requests that gave none, and of the samples of one request; the second is the golden ratio in
# 64 bits, no small multiple of the first, so that no sample of one request equals one of a neighbour.
_REQUEST_STRIDE = 1_000_003
_SAMPLE_STRIDE = 0x9E3779B97F4A7C15

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that is being computed, and whom its tokens are for: one entry for each chunk that samples."""

    step: Step
    samples: list[tuple[Tracked, Sample]]
    flight: Flight

    @property
    def wanted(self) -> bool:
        """Whether a request of it still goes on."""
        return any(chunk.request.status is RequestStatus.RUNNING for chunk in self.step.chunks)


class Engine:
    """Runs a model for many requests at once."""

    def __init__(self, options: EngineConfig, ranks: Supervisor | None = None) -> None:
        """ranks: processes to use, if the plan has several ranks; they outlive the engine. None: it starts its own."""
        self.options = options
        self.scheduler: Scheduler | DataRanks
        self._started: Started | StartedRanks
        self.runner: ModelRunner | RankedRunner
        if options.parallel.num_ranks > 1:
            self._started, self.runner = start_ranks(options, ranks)
        else:
            self._started = started = start(options)
            self.runner = ModelRunner(started.model, started.cache, started.device, started.graphed)
        self.config = self._started.config
        self.tokenizer = self._started.tokenizer
        self._start_anew()
        self._numbers = itertools.count()
        self._closed = False

    def _start_anew(self) -> None:
        cache = self.options.cache
        blocks = [
            BlockManager(self._started.num_blocks, cache.block_size, cache.enable_prefix_caching)
            for _ in range(self.options.parallel.data_parallel_size)
        ]
        limits = self.options.scheduler
        self.scheduler = Scheduler(limits, blocks[0]) if len(blocks) == 1 else DataRanks(limits, blocks)
        self._tracked: dict[str, Tracked] = {}
        self._owner: dict[str, tuple[Tracked, Sample]] = {}  # by the id of a sample's sequence
        self._ahead: _Launched | None = None  # the next step, if it is being computed already

    @property
    def has_unfinished(self) -> bool:
        return bool(self._tracked)

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output may have together: the model's context, or less if the KV cache is smaller."""
        self._check_open()
        return min(self._started.max_model_len, self.scheduler.num_tokens)

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
        ids = self._check_request(prompt_token_ids, sampling)
        request_id = request_id or self.new_id()
        number = next(self._numbers)
        samples = [self._make_sample(request_id, number, i, ids, sampling) for i in range(sampling.n)]
        for sample in samples:
            if sample.request.request_id in self._owner:
                raise RequestError(f"request_id={sample.request.request_id!r} is still being served; use another id.")
        self._whole(self._queue, Tracked(request_id, prompt, ids, sampling, stream, samples))
        return request_id

    def new_id(self) -> str:
        """An id that no request has had yet, unless it was made up by somebody else."""
        return f"request-{next(self._numbers)}"

    def step(self) -> list[RequestOutput]:
        """Compute one step. Returns the outputs of the requests that finished, and of those that stream.

        If it raises, nothing of the step counts: the next one computes it again, or abort() ends its requests.
        """
        self._check_open()
        current, self._ahead = self._ahead, None
        current = current or self._launch(self._whole(self.scheduler.schedule))
        if current is None:
            return []
        following = self._launch_behind(current)
        sampled = current.flight.wait()
        outputs = self._whole(self._advance, current, sampled)
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

    def close(self) -> None:
        """Discard what runs and let go of model and cache. May be called twice."""
        if not self._closed:
            self.discard(list(self._tracked))
            self._closed = True
            self._ahead = None
            runner = self.runner
            del self.runner, self._started
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
            "quantization": self.options.device.quantization,
            "threads": s.threads,
            "expert_backend": s.backend,
            "decode_kernels": s.decode_kernels,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.options.scheduler.max_num_seqs,
            "max_num_batched_tokens": self.options.scheduler.max_num_batched_tokens,
            "kv_cache_blocks": s.num_blocks,
            "block_size": self.options.cache.block_size,
            "kv_cache_bytes": s.cache.num_bytes,
            "prefix_caching": self.options.cache.enable_prefix_caching,
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

    @property
    def local_runner(self) -> ModelRunner:
        """The runner of a model in this process. Raises ConfigError if the model is spread over several."""
        if isinstance(self.runner, RankedRunner):
            raise ConfigError("this looks into a model of one process; use degrees of parallelism of 1.")
        return self.runner

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed; make a new one.")

    def _check_request(self, prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
        """The prompt's token ids. Raises RequestError for what cannot be served."""
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling_params={sampling!r} is not SamplingParams.")
        if not is_list(prompt):
            raise RequestError(f"the prompt is of type {type(prompt).__name__}; use a string or a list of token ids.")
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token.")
        self._check_length(len(prompt))
        vocab = self.config.vocab_size
        for position, token in enumerate(prompt):
            if type(token) is not int:
                raise RequestError(
                    f"token id {token!r} at position {position} of the prompt is of type {type(token).__name__}; "
                    "use Python's int."
                )
            if not 0 <= token < vocab:
                raise RequestError(
                    f"token id {token} at position {position} of the prompt is outside of the vocabulary; "
                    f"use 0 to {vocab - 1}."
                )
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids.")
        return tuple(prompt)

    def _check_length(self, length: int) -> None:
        limit = self.max_model_len
        if length < limit:
            return
        if limit < self._started.max_model_len:
            holder = f"the KV cache of {limit} tokens"
            remedy = "raise kv_cache_memory" if limit > 1 else "raise block_size"
        else:
            holder, remedy = f"the context of max_model_len={limit}", ""
        raise RequestError(
            f"the prompt has {length} tokens, but {holder} must also hold at least one new token; "
            f"shorten it to {limit - 1} tokens{remedy and ' or ' + remedy}."
        )

    def _make_sample(
        self, request_id: str, number: int, index: int, ids: tuple[int, ...], sampling: SamplingParams
    ) -> Sample:
        seed = self.options.seed + number * _REQUEST_STRIDE if sampling.seed is None else sampling.seed
        request = Request(
            request_id if index == 0 else f"{request_id}/{index}",
            ids,
            sampling,
            eos_token_ids=self.config.eos_token_ids,
            max_total_tokens=self.max_model_len,
        )
        state = SamplingState(
            sampling,
            seed + index * _SAMPLE_STRIDE,
            ids,
            eos_token_ids=self.config.eos_token_ids,
            vocab_size=self.config.vocab_size,
        )
        detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, ids, sampling)
        return Sample(request, state, detokenizer)

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

    def _launch(self, step: Step, after: _Launched | None = None) -> _Launched | None:
        if not step.chunks:
            return None
        samples = [self._owner[chunk.request.request_id] for chunk in step.chunks if chunk.samples]
        states = [sample.state for _, sample in samples]
        return _Launched(step, samples, self.runner.launch(step, states, after=None if after is None else after.flight))

    def _launch_behind(self, current: _Launched) -> _Launched | None:
        """The step behind the current one, launched already, if runner and scheduler see a way."""
        if not self.runner.can_run_ahead(current.step, [sample.state for _, sample in current.samples]):
            return None
        step = self._whole(self.scheduler.schedule_ahead, current.step)
        return None if step is None else self._launch(step, current)

    def _advance(self, launched: _Launched, sampled: SampleOutput) -> list[RequestOutput]:
        """Give each sample its token, but for those that ended while it was computed."""
        going = []
        for (tracked, sample), token, logprobs in zip(
            launched.samples, sampled.token_ids, sampled.logprobs, strict=True
        ):
            if sample.finished:
                continue
            sample.state.accept(token)
            if logprobs is not None:
                sample.logprobs.append(logprobs)
            going.append((tracked, sample))
        self.scheduler.update(launched.step, sampled.token_ids)
        return self._read(going)

    def _read(self, samples: Sequence[tuple[Tracked, Sample]]) -> list[RequestOutput]:
        """Bring the texts of these up to date, end those that met a stop string, collect outputs."""
        now = time.monotonic()
        for tracked, sample in samples:
            tracked.first_token = tracked.first_token or now
            if tracked.reads_every_step or sample.finished:
                stop = sample.read()
                if stop is not None:
                    self.scheduler.finish(sample.request, "stop", stop)
        outputs = []
        # Each once, though several of its samples may be in the step.
        for tracked in {tracked.request_id: tracked for tracked, _ in samples}.values():
            if tracked.finished:
                tracked.end = time.monotonic()
                self._forget(tracked)
            if tracked.finished or tracked.stream:
                outputs.append(tracked.output())
        return outputs

    def _drop(self, tracked: Tracked) -> None:
        for sample in tracked.samples:
            self.scheduler.abort(sample.request.request_id)
        self._forget(tracked)
        if self._ahead is not None and not self._ahead.wanted:
            self._ahead = None

    def _forget(self, tracked: Tracked) -> None:
        del self._tracked[tracked.request_id]
        for sample in tracked.samples:
            del self._owner[sample.request.request_id]


def is_list(value: object) -> bool:
    """Whether this is a sequence of things of its own: a text or bytes is not, though Python calls it one."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))
