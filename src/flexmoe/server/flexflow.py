"""POST /generate/, as FlexFlow's FastAPI examples answer it. Enters: {"prompt": text}. Leaves: prompt and response."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from flexmoe.config.sampling import SamplingParams
from flexmoe.serve import lengths
from flexmoe.server.openai import GenerateRequest
from flexmoe.server.replies import GenerateReply, generated
from flexmoe.server.service import Service
from flexmoe.server.stream import Answer


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/generate/", response_model=None, responses=generated(GenerateReply))
    async def generate(body: GenerateRequest, http: Request) -> Response:
        """Complete one prompt greedily. The response is what follows the prompt."""
        new_tokens = lengths.UNSET if body.max_new_tokens is None else body.max_new_tokens
        # FlexFlow's rule: if both are given, max_new_tokens counts.
        length = body.max_length if body.max_length is not None and new_tokens == lengths.UNSET else lengths.UNSET
        chosen = lengths.choose(length, new_tokens, service.max_model_len)
        prompt = await service.encode(body.prompt)
        tokens = lengths.new_tokens(*chosen, len(prompt.token_ids), service.max_model_len)
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, skip_special_tokens=False)
        generation = await service.generate(http, [prompt], sampling, stream=False, prefix="gen")

        async def answer() -> dict[str, str]:
            outputs = await generation.outputs()
            return {"prompt": body.prompt, "response": outputs[0].text}

        return Answer(answer, generation.close)

    return router
