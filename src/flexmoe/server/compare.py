"""POST /v1/flexmoe/compare: an answer of the engine compared with. Enters: a conversation. Leaves: events.

Which engine that is, the server's operator said at start; no request can name another one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from flexmoe.server.errors import APIError
from flexmoe.server.openai import Messages, Strict
from flexmoe.server.replies import errors
from flexmoe.server.rival import Question, Rival
from flexmoe.server.service import Service
from flexmoe.server.stream import EventStream

MAX_QUESTIONS = 8  # each holds a thread, and a place of the other engine's
_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string", "description": "Server-sent events."}}}},
    **errors(400, 404, 408, 413, 415, 429),
}


class CompareRequest(Strict):
    """A conversation to go on with, greedily. ignore_eos: write on after the end."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] = 128
    ignore_eos: bool = False


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()
    asking: set[object] = set()

    @router.post("/v1/flexmoe/compare", response_class=Response, responses=_DOCUMENTED)
    async def compare(body: CompareRequest) -> Response:
        """Let the other engine answer: `status` events while it is made ready, then chunks as of a chat."""
        rival = service.compare
        if rival is None:
            message = "this server compares with nothing; start it with --compare hf or --compare URL."
            raise APIError(404, message, code="nothing_to_compare")
        question = await _question(service, body)
        if len(asking) >= MAX_QUESTIONS:
            message = f"{MAX_QUESTIONS} questions are all that this server passes on at a time."
            raise APIError(429, message, code="too_many_questions", headers={"Retry-After": "10"})
        asking.add(own := object())
        return EventStream(_events(rival, question), lambda: asking.remove(own))

    return router


async def _events(rival: Rival, question: Question) -> AsyncIterator[bytes]:
    async for event in rival.answer(question):
        yield event


async def _question(service: Service, body: CompareRequest) -> Question:
    messages = [message.model_dump() for message in body.messages]
    prompt = await service.encode_chat(messages, {})
    service.check_length(len(prompt.token_ids))
    room = service.max_model_len - len(prompt.token_ids)
    return Question(messages, prompt.token_ids, min(body.max_tokens, room), body.ignore_eos)
