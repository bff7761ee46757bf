"""POST /v1/responses: OpenAI's newer face for the same work. Enters: text or messages. Leaves: one message of text.

Nothing is stored: a response cannot be fetched, cancelled or continued by its id.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.outputs import RequestOutput
from flexmoe.errors import FlexMoEError
from flexmoe.server.errors import as_api_error
from flexmoe.server.openai import ResponsesRequest
from flexmoe.server.replies import ResponseReply, generated
from flexmoe.server.service import Generation, Service
from flexmoe.server.stream import Answer, EventStream, event_of


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=None, responses=generated(ResponseReply))
    async def responses(body: ResponsesRequest, http: Request) -> Response:
        """Answer a text or a conversation."""
        service.check_model(body.model)
        sampling = _sampling(body)
        prompt = await service.encode_chat(_messages(body), {})
        generation = await service.generate(http, [prompt], sampling, stream=bool(body.stream), prefix="resp")
        work = _Response(service, body, sampling, generation)
        if body.stream:
            return EventStream(work.events(), generation.close, end=b"")
        return Answer(work.answer, generation.close)

    return router


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation, instructions first."""
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": item.content})  # type: ignore[dict-item]
    return messages


def _sampling(body: ResponsesRequest) -> SamplingParams:
    chosen = {"temperature": body.temperature, "top_p": body.top_p}
    values: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if body.text is not None and body.text.format is not None:
        values["json_schema"] = body.text.format.schema_of()
    return SamplingParams(max_tokens=body.max_output_tokens, **values)


class _Response:
    """One request's answer, at once or as events."""

    def __init__(
        self, service: Service, body: ResponsesRequest, sampling: SamplingParams, generation: Generation
    ) -> None:
        self._generation, self._numbers = generation, itertools.count()
        self._item_id = "msg" + generation.id.removeprefix("resp")
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
        self._head = {
            "id": generation.id,
            "object": "response",
            "created_at": generation.created,
            "model": service.name,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "text": {"format": {"type": "text"}, **text},
            "metadata": body.metadata or {},
            "store": False,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "previous_response_id": None,
        }

    async def answer(self) -> dict[str, Any]:
        """All of it."""
        return self._finished((await self._generation.outputs())[0])

    async def events(self) -> AsyncIterator[bytes]:
        """The growth of the one message, between events that open and close what holds it."""
        begun = self._whole("in_progress", [])
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", None))
        yield self._event("response.content_part.added", **self._place, part=_part(""))
        told, output = 0, None
        try:
            async for _, output in self._generation.merged():
                if len(output.text) > told:
                    delta, told = output.text[told:], len(output.text)
                    yield self._event("response.output_text.delta", **self._place, delta=delta, logprobs=[])
        except FlexMoEError as error:
            detail = as_api_error(error).body["error"]
            failure = {"code": "server_error", "message": detail["message"]}
            yield self._event("response.failed", response={**begun, "status": "failed", "error": failure})
            return
        assert output is not None
        finished = self._finished(output)
        yield self._event("response.output_text.done", **self._place, text=output.text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=_part(output.text))
        yield self._event("response.output_item.done", output_index=0, item=finished["output"][0])
        yield self._event(f"response.{finished['status']}", response=finished)

    def _finished(self, output: RequestOutput) -> dict[str, Any]:
        """The response with its message; incomplete if the answer was cut at a limit."""
        cut = output.outputs[0].finish_reason == "length"
        status = "incomplete" if cut else "completed"
        whole = self._whole(status, [self._item(status, output.text)])
        prompt, generated_tokens = len(output.prompt_token_ids), len(output.token_ids)
        whole["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": output.metrics.num_cached_tokens},
            "output_tokens": generated_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + generated_tokens,
        }
        return whole | {"incomplete_details": {"reason": "max_output_tokens"} if cut else None}

    def _whole(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        empty = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, "output": output, **empty}

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event_of({"type": kind, "sequence_number": next(self._numbers), **fields}, name=kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
