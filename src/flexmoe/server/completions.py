"""POST /v1/completions. Enters: prompts as text or token ids. Leaves: their continuations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.outputs import CompletionOutput, RequestOutput
from flexmoe.errors import RequestError
from flexmoe.server.deltas import Deltas
from flexmoe.server.openai import CompletionRequest
from flexmoe.server.pieces import LogprobsWriter, ending, timings, usage
from flexmoe.server.replies import Completion, generated
from flexmoe.server.service import Generation, Prompt, Service
from flexmoe.server.stream import Answer, EventStream, event_of

_DEFAULT_TOKENS = 16  # OpenAI's


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None, responses=generated(Completion))
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continue prompts."""
        service.check_model(body.model)
        prompts = await _prompts(service, body)
        sampling = _sampling(body)
        generation = await service.generate(http, prompts, sampling, stream=bool(body.stream), prefix="cmpl")
        work = _Completions(service, body, sampling, generation, prompts)
        if body.stream:
            return EventStream(work.events(), generation.close)
        return Answer(work.answer, generation.close)

    return router


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    given = body.prompt
    if isinstance(given, str):
        texts: list[Any] = [given]
    elif isinstance(given[0], int):
        texts = [given]
    else:
        texts = list(given)
    service.check_count(len(texts))
    if "" in texts:
        raise RequestError("prompt is an empty string; give at least one character.")
    prompts = [await service.encode(one) if isinstance(one, str) else Prompt(one) for one in texts]
    if body.echo:
        prompts = [p if p.text is not None else Prompt(p.token_ids, _decode(service, p.token_ids)) for p in prompts]
    return prompts


def _decode(service: Service, token_ids: Sequence[int]) -> str:
    service.check_length(len(token_ids))
    try:
        return service.tokenizer.decode(token_ids)
    except OverflowError as error:
        raise RequestError("a token id of the prompt is outside of the vocabulary.") from error


def _sampling(body: CompletionRequest) -> SamplingParams:
    if body.echo and body.logprobs is not None:
        raise RequestError("echo with logprobs asks for those of the prompt, which are not computed; use one of them.")
    tokens = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = body.sampling(max_tokens=tokens, logprobs=body.logprobs)
    best_of = body.best_of
    if best_of is None or best_of == sampling.n:
        return sampling
    if best_of < sampling.n or body.stream:
        raise RequestError(f"best_of={best_of} must be at least n={sampling.n}, and equal to it in a stream.")
    return replace(sampling, n=best_of, logprobs=sampling.logprobs or 0)


class _Completions:
    """One request's answer, at once or as events."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        sampling: SamplingParams,
        generation: Generation,
        prompts: Sequence[Prompt],
    ) -> None:
        self._body, self._n, self._generation = body, body.n or 1, generation
        self._sampled = sampling.n
        self._echoes = [prompt.text or "" if body.echo else "" for prompt in prompts]
        self._logprobs = LogprobsWriter(service.engine.engine.tokenizer)
        self._head = {"id": generation.id, "object": "text_completion", "created": generation.created}
        self._head["model"] = service.name

    async def answer(self) -> dict[str, Any]:
        """All of it."""
        outputs = await self._generation.outputs()
        choices = [
            self._choice(place * self._n + rank, self._echoes[place], sample)
            for place, output in enumerate(outputs)
            for rank, sample in enumerate(self._best(output))
        ]
        return {**self._head, "choices": choices, "usage": usage(outputs)}

    async def events(self) -> AsyncIterator[bytes]:
        """A chunk for each piece of text."""
        deltas, last = Deltas(self._sampled), {}
        usage_field = {"usage": None} if self._body.tells_usage else {}
        async for place, output in self._generation.merged():
            last[place] = output
            for delta in deltas.of(place, output):
                offset = len(delta.sample.text) - len(delta.text) + len(self._echoes[place]) * (not delta.first)
                choice = {
                    "index": delta.choice,
                    "text": self._echoes[place] * delta.first + delta.text,
                    "logprobs": self._logprobs.completion(delta.logprobs, offset),
                    **ending(delta.sample),
                }
                yield event_of({**self._head, "choices": [choice], **usage_field})
        if self._body.tells_usage:
            outputs = list(last.values())
            times = {"timings": timings(outputs[0])} if len(outputs) == 1 else {}
            yield event_of({**self._head, "choices": [], "usage": usage(outputs), **times})

    def _best(self, output: RequestOutput) -> Sequence[CompletionOutput]:
        """The n samples with the highest mean log-probability, if more were asked for by best_of."""
        if self._sampled == self._n:
            return output.outputs
        return sorted(output.outputs, key=_mean_logprob, reverse=True)[: self._n]

    def _choice(self, index: int, echo: str, sample: CompletionOutput) -> dict[str, Any]:
        logprobs = sample.logprobs if self._body.logprobs is not None else None
        return {
            "index": index,
            "text": echo + sample.text,
            "logprobs": self._logprobs.completion(logprobs, len(echo)),
            **ending(sample),
        }


def _mean_logprob(sample: CompletionOutput) -> float:
    assert sample.logprobs is not None
    return sum(entry.logprob for entry in sample.logprobs) / max(1, len(sample.logprobs))
