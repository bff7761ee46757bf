"""GET /v1/flexmoe/about and /v1/flexmoe/routing: what the engine runs with, and which experts it has chosen so far."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from flexmoe import __version__
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.server.replies import AboutReply, errors
from flexmoe.server.service import Service

_RECORDING: dict[int | str, dict[str, Any]] = {200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}}


def routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.get("/v1/flexmoe/about", response_model=AboutReply, responses=errors())
    async def about() -> Any:
        """Model, plan, kernels, and what the figures of the live events mean."""
        return _about(service)

    @router.get("/v1/flexmoe/routing", response_class=Response, responses={**_RECORDING, **errors()})
    async def routing() -> Response:
        """A recording of the steps that were looked at, as `flexmoe balance` reads it."""
        lines = [json.dumps(load.to_json()) + "\n" for load in service.engine.experts.loads.values()]
        return Response("".join(lines), media_type="application/jsonl")

    return router


def _about(service: Service) -> dict[str, Any]:
    engine = service.engine.engine
    metrics = engine.metrics
    return {
        "version": __version__,
        "model": service.name,
        "engine": {**service.about, "model": service.name},
        "kernels": _kernels(service.about),
        "experts": _experts(engine.config, engine.options.parallel),
        "latency_bounds": {"ttft": metrics.ttft.bounds, "itl": metrics.itl.bounds, "e2e": metrics.e2e.bounds},
        "compare": service.compare.about() if service.compare is not None else None,
    }


def _kernels(about: Any) -> dict[str, str]:
    """Which kernels serve which operation."""
    prompts = about["prompt_kernels"]
    return {
        "Decode steps: attention, router, experts, head": about["decode_kernels"],
        "Prompts: attention, router": prompts,
        # On a GPU dense products of many rows are torch's, whoever computes what is between them.
        "Prompts: projections, head": prompts if prompts.startswith("C") else "torch",
        "Prompts: experts": about["expert_backend"] if prompts == "torch" else prompts,
    }


def _experts(config: ModelConfig, plan: ParallelPlan) -> dict[str, Any] | None:
    """placements: by MoE layer, the experts in the slots of each rank that experts are spread over."""
    if config.moe is None:
        return None
    layers = [number for number, layer in enumerate(config.layers) if layer.is_moe]
    placements = [plan.placement(config.moe.num_experts, layer).slots for layer in layers]
    return {
        "layers": layers,
        "num_experts": config.moe.num_experts,
        "top_k": config.moe.top_k,
        "placements": placements if plan.num_ranks > 1 else None,
    }


def resident_bytes() -> int | None:
    """Memory of this process; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
