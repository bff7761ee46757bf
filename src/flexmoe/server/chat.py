"""POST /v1/chat/completions. Enters: a conversation. Leaves: the assistant's next turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError
from flexmoe.server.deltas import Delta, Deltas
from flexmoe.server.openai import MAX_ROUTED_TOKENS, ChatRequest
from flexmoe.server.pieces import LogprobsWriter, RoutingWriter, ending, timings, usage
from flexmoe.server.replies import ChatCompletion, generated
from flexmoe.server.service import Generation, Service
from flexmoe.server.stream import Answer, EventStream, event_of


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None, responses=generated(ChatCompletion))
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        sampling = _sampling(body)
        messages = [message.model_dump() for message in body.messages]
        prompt = await service.encode_chat(messages, body.chat_template_kwargs or {})
        generation = await service.generate(http, [prompt], sampling, stream=bool(body.stream), prefix="chatcmpl")
        work = _Chat(service, body, sampling.n, generation)
        if body.stream:
            return EventStream(work.events(), generation.close)
        return Answer(work.answer, generation.close)

    return router


def _sampling(body: ChatRequest) -> SamplingParams:
    """No limit of tokens means up to the model's context, as in OpenAI's API."""
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them.")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true.")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    routing = MAX_ROUTED_TOKENS if body.return_routing else 0
    return body.sampling(max_tokens=next(iter(limits), None), logprobs=logprobs, routing=routing)


class _Chat:
    """One request's answer, at once or as events."""

    def __init__(self, service: Service, body: ChatRequest, num_samples: int, generation: Generation) -> None:
        self._generation, self._n, self._tells_usage = generation, num_samples, body.tells_usage
        self._logprobs = LogprobsWriter(service.engine.engine.tokenizer)
        self._routing = RoutingWriter(service.engine.engine.tokenizer)
        self._head = {"id": generation.id, "created": generation.created, "model": service.name}

    async def answer(self) -> dict[str, Any]:
        """All of it."""
        outputs = await self._generation.outputs()
        choices = [
            {
                "index": sample.index,
                "message": {"role": "assistant", "content": sample.text, "refusal": None},
                "logprobs": self._logprobs.chat(sample.logprobs),
                **self._routing.of(sample, 0, sample.routing),
                **ending(sample),
            }
            for sample in outputs[0].outputs
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(outputs)}

    async def events(self) -> AsyncIterator[bytes]:
        """First who speaks, then a chunk for each piece of text."""
        deltas, output = Deltas(self._n), None
        async for place, output in self._generation.merged():
            for delta in deltas.of(place, output):
                if delta.first:
                    yield self._event([{"index": delta.choice, "delta": {"role": "assistant", "content": ""}}])
                yield self._event([self._choice(delta)])
        if self._tells_usage and output is not None:
            yield self._event([], usage([output]), timings(output))

    def _choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs.chat(delta.logprobs),
            **self._routing.of(delta.sample, delta.num_routed, delta.routing),
            **ending(delta.sample),
        }

    def _event(
        self,
        choices: list[dict[str, Any]],
        tokens: dict[str, Any] | None = None,
        times: dict[str, Any] | None = None,
    ) -> bytes:
        for choice in choices:
            choice.setdefault("finish_reason", None)
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._tells_usage:
            chunk |= {"usage": tokens} | ({"timings": times} if times else {})
        return event_of(chunk)
