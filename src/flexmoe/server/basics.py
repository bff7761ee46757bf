"""What does not generate: models, tokens, health, version, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from flexmoe import __version__
from flexmoe.errors import RequestError
from flexmoe.server.errors import APIError
from flexmoe.server.openai import DetokenizeRequest, TokenizeRequest
from flexmoe.server.prometheus import CONTENT_TYPE, page
from flexmoe.server.replies import (
    DetokenizeReply,
    HealthReply,
    ModelCard,
    ModelList,
    TokenizeReply,
    VersionReply,
    errors,
)
from flexmoe.server.service import Service

_REFUSALS = errors(400, 404, 408, 413, 415)


def routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter()
    _add_models(router, service)
    _add_tokens(router, service)
    _add_state(router, service)
    return router


def _add_models(router: APIRouter, service: Service) -> None:
    card = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "flexmoe",
        "max_model_len": service.max_model_len,
        "vocab_size": service.engine.engine.config.vocab_size,
    }

    @router.get("/v1/models", response_model=ModelList, responses=errors())
    async def models() -> Any:
        """What is served: one model."""
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(404))
    async def model(name: str) -> Any:
        """One model by its name."""
        service.check_model(name)
        return card


def _add_tokens(router: APIRouter, service: Service) -> None:
    @router.post("/tokenize", response_model=TokenizeReply, responses=_REFUSALS)
    async def tokenize(body: TokenizeRequest) -> Any:
        """Token ids of a text or of a conversation."""
        service.check_model(body.model)
        if body.messages is not None and body.prompt is None:
            prompt = await service.encode_chat([message.model_dump() for message in body.messages], {}, limited=False)
        elif body.prompt is not None and body.messages is None:
            prompt = await service.encode(body.prompt, special=body.add_special_tokens, limited=False)
        else:
            raise RequestError("give either prompt or messages.")
        tokens = list(prompt.token_ids)
        return {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}

    @router.post("/detokenize", response_model=DetokenizeReply, responses=_REFUSALS)
    async def detokenize(body: DetokenizeRequest) -> Any:
        """Text of token ids, special tokens included."""
        service.check_model(body.model)
        limit = service.engine.engine.config.vocab_size
        wrong = next((token for token in body.tokens if not 0 <= token < limit), None)
        if wrong is not None:
            raise APIError(400, f"token id {wrong} is outside of the vocabulary; use 0 to {limit - 1}.", param="tokens")
        return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens, False)}


def _add_state(router: APIRouter, service: Service) -> None:
    unwell: dict[int | str, dict[str, Any]] = {503: {"model": HealthReply}}

    @router.get("/health", response_model=HealthReply, responses=unwell)
    @router.get("/health/live", response_model=HealthReply, responses=unwell)
    async def live() -> Response:
        """Whether the engine lives and does not hang: 200, or 503."""
        return _health(service, ("ok", "draining"))

    @router.get("/health/ready", response_model=HealthReply, responses=unwell)
    async def ready() -> Response:
        """Whether new requests are taken: 200, or 503, also while the server shuts down."""
        return _health(service, ("ok",))

    @router.get("/version", response_model=VersionReply, responses=errors())
    async def version() -> Any:
        """FlexMoE's version."""
        return {"version": __version__}

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @router.get("/metrics", response_class=Response, responses={**text, **errors()})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(page(service), media_type=CONTENT_TYPE)


def _health(service: Service, well: tuple[str, ...]) -> Response:
    status, hang = service.status, service.engine.hang
    reason = {"reason": hang} if status == "hung" and hang is not None else {}
    return JSONResponse({"status": status, **reason}, 200 if status in well else 503)
