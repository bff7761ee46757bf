"""GET /v1/flexmoe/events: live figures of the engine and its experts, as server-sent events for a web page.

Listeners share nothing with the engine but the numbers it keeps anyway; expert loads are those of its latest look.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Query
from starlette.responses import Response

from flexmoe.config.routing import imbalance
from flexmoe.server.about import resident_bytes
from flexmoe.server.errors import APIError
from flexmoe.server.replies import EVENTS, errors
from flexmoe.server.service import Service
from flexmoe.server.stream import EventStream, event_of

MAX_LISTENERS = 32
MIN_INTERVAL = 1 / 64  # seconds; a screen shows no more
_MEMORY_SECONDS = 1.0
_SLOW_SECONDS = 0.25
_TICK = 0.1  # seconds within which the end of the server is noticed

_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": EVENTS},
    **errors(400, 429),
}


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()
    listeners: dict[object, float] = {}  # with their intervals

    def changed() -> None:
        """The experts are looked at as often as the most eager listener asks for, if that is more often than usual."""
        service.engine.look_every(min(listeners.values(), default=None))

    @router.get("/v1/flexmoe/events", response_class=Response, responses=_DOCUMENTED)
    async def events(
        interval: Annotated[float, Query(ge=MIN_INTERVAL, le=60)] = 1.0,
        count: Annotated[int | None, Query(ge=1)] = None,
        changes: bool = False,
    ) -> Response:
        """Figures every `interval` seconds; `count` times, or until one of both sides ends it.

        changes: leave out the experts where there was no new look at them, and most sums unless a while has passed.
        """
        if len(listeners) >= MAX_LISTENERS:
            message = f"{MAX_LISTENERS} listeners are all that this server has room for."
            raise APIError(429, message, code="too_many_listeners", headers={"Retry-After": "10"})
        listener = object()

        def leave() -> None:
            del listeners[listener]
            changed()

        listeners[listener] = interval
        changed()
        return EventStream(_events(service, interval, count, changes), leave, end=b"")

    return router


async def _events(service: Service, interval: float, count: int | None, changes: bool) -> AsyncIterator[bytes]:
    before = figures(service)
    slow = _Slow(service, changes)
    sent = 0
    while service.status == "ok" and (count is None or sent < count):
        now = figures(service)
        yield event_of({**now, "rates": _rates(before, now), **slow.due(time.monotonic())}, name="figures")
        before, sent = now, sent + 1
        if sent != count:
            await _pause(service, interval)


async def _pause(service: Service, seconds: float) -> None:
    """Sleep, but not beyond the end of the server."""
    end = time.monotonic() + seconds
    while service.status == "ok" and (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, _TICK))


def figures(service: Service) -> dict[str, Any]:
    """What may change with every step; docs/server.md says what each figure is."""
    engine = service.engine.engine
    scheduler, metrics = engine.scheduler, engine.metrics
    blocks = scheduler.blocks
    return {
        "time": round(time.time(), 3),
        "requests": {"running": scheduler.num_running, "waiting": scheduler.num_waiting},
        "kv_cache": {"blocks": blocks.num_blocks, "used": blocks.num_blocks - blocks.num_free},
        "tokens": {"prompt": metrics.prompt_tokens, "generated": metrics.generated_tokens},
        "steps": metrics.steps,
    }


class _Slow:
    """What is worth telling more seldom than many times a second, to one listener."""

    def __init__(self, service: Service, changes: bool) -> None:
        """changes: whether the listener does without what has not changed, or was told a moment ago."""
        self._service, self._changes = service, changes
        self._memory = _Memory(service.engine.engine.local_device)
        self._looks, self._next = -1, -math.inf

    def due(self, now: float) -> dict[str, Any]:
        """What is to be told beside the figures."""
        found: dict[str, Any] = {}
        if not self._changes or now >= self._next:
            self._next = now + _SLOW_SECONDS
            found |= self._totals()
        looks = self._service.engine.experts.looks
        if not self._changes or looks != self._looks:
            self._looks = looks
            found["experts"] = _experts(self._service)
        return found

    def _totals(self) -> dict[str, Any]:
        engine = self._service.engine.engine
        stats, metrics = engine.scheduler.blocks.stats, engine.metrics
        return {
            "model": self._service.name,
            "prefix_cache": {"queried_tokens": stats.queried_tokens, "hit_tokens": stats.hit_tokens},
            "preemptions": metrics.preemptions,
            "finished": dict(metrics.finished),
            "latency": {"ttft": metrics.ttft.counts, "itl": metrics.itl.counts, "e2e": metrics.e2e.counts},
            "memory": self._memory.now(),
        }


def _rates(before: dict[str, Any], now: dict[str, Any]) -> dict[str, float]:
    """Tokens a second since the last event."""
    seconds = now["time"] - before["time"]
    return {
        kind: round((now["tokens"][kind] - before["tokens"][kind]) / seconds, 1) if seconds > 0 else 0.0
        for kind in ("prompt", "generated")
    }


def _experts(service: Service) -> list[dict[str, Any]]:
    experts = service.engine.experts
    return [
        {
            "layer": load.layer,
            "counts": load.counts,
            "total": experts.loads[load.layer].counts,
            "tokens": load.tokens,
            "imbalance": round(imbalance(load.counts), 3),
            "active": round(load.mean_active, 2),
        }
        for load in experts.latest.values()
    ]


class _Memory:
    """Bytes of this process, and what torch holds of the GPU; null for what is not known. Asking is slow: seldom."""

    def __init__(self, device: torch.device | None) -> None:
        """device: of a model in this process."""
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._asked = -math.inf
        self._told: dict[str, int | None] = {}

    def now(self) -> dict[str, int | None]:
        """As it was within the last second."""
        now = time.monotonic()
        if now - self._asked > _MEMORY_SECONDS:
            gpu = None if self._gpu is None else torch.cuda.memory_reserved(self._gpu)
            self._asked, self._told = now, {"resident_bytes": resident_bytes(), "gpu_bytes": gpu}
        return self._told
