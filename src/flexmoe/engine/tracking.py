"""Tracked requests: what the engine keeps of a request beside the scheduler's part. Leaves: RequestOutput."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.detokenizer import Detokenizer
from flexmoe.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs, TokenRouting
from flexmoe.engine.sampler import NO_TOKEN, SamplingState
from flexmoe.errors import EngineError
from flexmoe.scheduling.request import Request, RequestStatus


@dataclass(slots=True)
class Sample:
    """One of the n samples of a request: a sequence of its own to the scheduler.

    num_read: output tokens already handed to the detokenizer, which is None when the model has no tokenizer.
    first_token, last_token: when they came, in seconds of `time.monotonic()`.
    """

    request: Request
    state: SamplingState
    detokenizer: Detokenizer | None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    routing: list[TokenRouting] = field(default_factory=list)
    num_read: int = 0
    first_token: float | None = None
    last_token: float | None = None

    @property
    def finished(self) -> bool:
        return self.request.status is RequestStatus.FINISHED

    def take(self, token_id: int, logprobs: TokenLogprobs | None, routing: TokenRouting | None) -> None:
        """Remember a token. Raises EngineError if it is none, because the row's logits were not numbers."""
        if token_id == NO_TOKEN:
            raise EngineError("the logits are not numbers; the weights may be damaged.")
        self.state.accept(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if routing is not None:
            self.routing.append(routing)

    def read(self) -> str | None:
        """Bring the text up to date. Returns the stop string that ends it, if one was found."""
        if self.detokenizer is None:
            return None
        request = self.request
        ids = request.token_ids[request.num_prompt_tokens + self.num_read : self._text_end()]
        self.num_read += len(ids)
        self.detokenizer.append(ids)
        if self.finished:
            self.detokenizer.flush()
        return self.detokenizer.stopped_by

    def _text_end(self) -> int:
        """The token that ended the request, end-of-sequence or a stop id, is not part of the text."""
        ended_by_token = self.finished and self.request.finish_reason == "stop"
        return self.request.num_tokens - ended_by_token

    def output(self, index: int, sampling: SamplingParams) -> CompletionOutput:
        request = self.request
        return CompletionOutput(
            index=index,
            text="" if self.detokenizer is None else self.detokenizer.text,
            token_ids=tuple(request.output_token_ids),
            logprobs=None if sampling.logprobs is None else tuple(self.logprobs),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            routing=tuple(self.routing) if sampling.routing else None,
        )


@dataclass(slots=True)
class Tracked:
    """A request with all its samples. stream: the caller wants an output after every step, not only at the end.

    scheduled: when a step first computed something of it. reported: whether its caller has had an output. error: why it
    alone could not go on.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stream: bool
    samples: list[Sample]
    arrival: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    first_token: float | None = None
    end: float | None = None
    reported: bool = False
    error: str | None = None

    def wanted(self, report: bool) -> bool:
        """Whether its caller wants an output of this step though it is not the last. report: see Engine.step."""
        return self.stream and (report or not self.reported)

    @property
    def finished(self) -> bool:
        return all(sample.finished for sample in self.samples)

    def report(self) -> RequestOutput:
        """An output for its caller."""
        self.reported = True
        return self.output()

    def output(self) -> RequestOutput:
        metrics = RequestMetrics(self.arrival, self.first_token, self.end, self.samples[0].request.num_cached_tokens)
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            tuple(sample.output(i, self.sampling) for i, sample in enumerate(self.samples)),
            self.finished,
            metrics,
            self.error,
        )
