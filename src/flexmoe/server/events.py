"""GET /v1/flexmoe/events: live figures of the engine and its experts, as server-sent events for a web page.

Listeners share nothing with the engine but the numbers it keeps anyway; expert loads are those of its latest look.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from flexmoe.config.routing import imbalance
from flexmoe.server.errors import APIError
from flexmoe.server.replies import EVENTS, errors
from flexmoe.server.service import Service
from flexmoe.server.stream import EventStream, event_of

MAX_LISTENERS = 32
_TICK = 0.1  # seconds within which the end of the server is noticed

_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": EVENTS},
    **errors(400, 429),
}


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()
    listeners: set[object] = set()

    @router.get("/v1/flexmoe/events", response_class=Response, responses=_DOCUMENTED)
    async def events(
        interval: Annotated[float, Query(ge=0.2, le=60)] = 1.0, count: Annotated[int | None, Query(ge=1)] = None
    ) -> Response:
        """Figures every `interval` seconds; `count` times, or until one of both sides ends it."""
        if len(listeners) >= MAX_LISTENERS:
            message = f"{MAX_LISTENERS} listeners are all that this server has room for."
            raise APIError(429, message, code="too_many_listeners", headers={"Retry-After": "10"})
        listener = object()
        listeners.add(listener)
        return EventStream(_events(service, interval, count), lambda: listeners.discard(listener), end=b"")

    return router


async def _events(service: Service, interval: float, count: int | None) -> AsyncIterator[bytes]:
    before = figures(service)
    sent = 0
    while service.status == "ok" and (count is None or sent < count):
        now = figures(service)
        yield event_of({**now, "rates": _rates(before, now)}, name="figures")
        before, sent = now, sent + 1
        if sent != count:
            await _pause(service, interval)


async def _pause(service: Service, seconds: float) -> None:
    """Sleep, but not beyond the end of the server."""
    end = time.monotonic() + seconds
    while service.status == "ok" and (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, _TICK))


def figures(service: Service) -> dict[str, Any]:
    """The state of now; docs/server.md says what each figure is."""
    engine = service.engine.engine
    scheduler, metrics = engine.scheduler, engine.metrics
    blocks = scheduler.blocks
    return {
        "time": round(time.time(), 3),
        "model": service.name,
        "requests": {"running": scheduler.num_running, "waiting": scheduler.num_waiting},
        "kv_cache": {"blocks": blocks.num_blocks, "used": blocks.num_blocks - blocks.num_free},
        "prefix_cache": {"queried_tokens": blocks.stats.queried_tokens, "hit_tokens": blocks.stats.hit_tokens},
        "tokens": {"prompt": metrics.prompt_tokens, "generated": metrics.generated_tokens},
        "steps": metrics.steps,
        "preemptions": metrics.preemptions,
        "finished": dict(metrics.finished),
        "experts": [
            {
                "layer": load.layer,
                "counts": load.counts,
                "total": service.engine.experts.loads[load.layer].counts,
                "tokens": load.tokens,
                "imbalance": round(imbalance(load.counts), 3),
                "active": round(load.mean_active, 2),
            }
            for load in service.engine.experts.latest.values()
        ],
    }


def _rates(before: dict[str, Any], now: dict[str, Any]) -> dict[str, float]:
    """Tokens a second since the last event."""
    seconds = now["time"] - before["time"]
    return {
        kind: round((now["tokens"][kind] - before["tokens"][kind]) / seconds, 1) if seconds > 0 else 0.0
        for kind in ("prompt", "generated")
    }
