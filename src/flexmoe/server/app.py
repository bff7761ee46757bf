"""The application: every endpoint, and what each request passes on its way to it. Enters: a Service. Leaves: ASGI.

Logged (id, log line) -> CORS if asked for -> Authorised if there are keys -> Bounded (body) -> FastAPI -> endpoint
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from flexmoe import __version__
from flexmoe.errors import FlexMoEError
from flexmoe.server import about, basics, chat, compare, completions, events, flexflow, responses
from flexmoe.server.errors import APIError, on_error, on_http_error, on_validation
from flexmoe.server.limits import Authorised, Bounded
from flexmoe.server.logs import Logged
from flexmoe.server.page import add_page
from flexmoe.server.service import Service


def build_app(service: Service) -> ASGIApp:
    """All of it, ready to be served."""
    config = service.config
    app: ASGIApp = Bounded(build_api(service), config.max_body_bytes, config.receive_seconds)
    if config.api_keys:
        app = Authorised(app, config.api_keys)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id"],
        )
    return Logged(app, service.http)


def build_api(service: Service) -> FastAPI:
    """The endpoints and their OpenAPI page."""
    api = FastAPIOffline(  # whose /docs loads nothing from elsewhere
        title="FlexMoE",
        version=__version__,
        description="OpenAI's API, and a few endpoints more. Every error is an OpenAI error object.",
        redoc_url=None,
    )
    for module in (completions, chat, responses, basics, flexflow, events, about, compare):
        api.include_router(module.routes(service))
    api.add_exception_handler(RequestValidationError, on_validation)
    api.add_exception_handler(HTTPException, on_http_error)
    for kind in (APIError, FlexMoEError, Exception):
        api.add_exception_handler(kind, on_error)
    add_page(api)
    _tell_truth(api)
    return api


def _tell_truth(api: FastAPI) -> None:
    """FastAPI documents status 422 for each body; here such refusals are 400, with an error object."""
    page = api.openapi()
    for path in page["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        page["components"]["schemas"].pop(name, None)
