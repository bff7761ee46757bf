"""Service: what all endpoints share. Enters: a request's model, prompts and parameters. Leaves: streams of outputs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request

from flexmoe.config.sampling import SamplingParams
from flexmoe.config.server import ServerConfig
from flexmoe.engine.async_engine import AsyncEngine, Job, Stream
from flexmoe.engine.chat_prompt import render_chat
from flexmoe.engine.grammar import schema_text
from flexmoe.engine.outputs import RequestOutput
from flexmoe.engine.tokenizer import LONG, Tokenizer
from flexmoe.errors import RequestError
from flexmoe.server.errors import APIError
from flexmoe.server.rival import Rival

_RETRY_SECONDS = "1"
# What a chat template is given by ourselves, and what `ChatTemplate.render` takes.
_TEMPLATE_NAMES = {"self", "messages", "tools", "template", "documents", "add_generation_prompt", "hide"}
# Characters of a JSON schema. Where a name may come next of thousands, each token of its answer costs the engine's
# thread, and with it everybody, hundreds of milliseconds; with as many as fit into this, six.
_MOST_SCHEMA = 2**15


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's token ids, and its text if it came as one."""

    token_ids: Sequence[int]
    text: str | None = None


class Generation:
    """The streams of one HTTP request: `n` samples of each prompt. Close it, whatever happens."""

    def __init__(self, request_id: str, streams: Sequence[Stream], log: dict[str, Any]) -> None:
        self.id, self.created = request_id, int(time.time())
        self._streams, self._log = streams, log

    async def outputs(self) -> list[RequestOutput]:
        """The finished outputs, by prompt."""
        outputs = [await stream.last() for stream in self._streams]
        self.note(outputs)
        return outputs

    async def merged(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs as they grow, each with its prompt's number. Of each prompt the last one is finished."""
        last: dict[int, RequestOutput] = {}
        async for place, output in _merge(self._streams):
            last[place] = output
            yield place, output
        self.note(list(last.values()))

    def note(self, outputs: Sequence[RequestOutput]) -> None:
        """Tell the log."""
        self._log |= {
            "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "output_tokens": sum(len(sample.token_ids) for output in outputs for sample in output.outputs),
            "finish": [sample.finish_reason for output in outputs for sample in output.outputs],
        }

    def close(self) -> None:
        """End what has not ended."""
        for stream in self._streams:
            stream.close()


class Service:
    """One model behind its endpoints."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self.engine, self.config = engine, config
        about = engine.engine.describe()
        self.about: Mapping[str, Any] = about
        self.name = config.served_model_name or _short_name(str(about["model"]))
        self.max_model_len: int = about["max_model_len"]
        self.created = int(time.time())
        self.http: Counter[tuple[str, int]] = Counter()  # requests by route and status
        self.draining = False
        self.compare: Rival | None = None
        # Limits of a step are each data rank's own.
        self._most_samples = about["max_num_seqs"] * about.get("data_parallel_size", 1) + config.max_waiting

    @property
    def status(self) -> str:
        """ok, draining, hung or dead."""
        if self.engine.error is not None:
            return "dead"
        return "hung" if self.engine.hang is not None else "draining" if self.draining else "ok"

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError if the model has none."""
        if self.engine.engine.tokenizer is None:
            raise RequestError("this model has no tokenizer; give prompts as lists of token ids.")
        return self.engine.engine.tokenizer

    def check_model(self, name: str | None) -> None:
        """Raises APIError for a model that is not served here."""
        if name is not None and name != self.name:
            message = f"the model {name!r} is not served here; use {self.name!r}."
            raise APIError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str, *, special: bool = True, limited: bool = True) -> Prompt:
        """A text as a prompt. special: with the special tokens that the model expects around it.

        limited: raise APIError for a text that is certainly too long, before that much is encoded.
        """
        tokenizer = self.tokenizer
        if len(text) <= LONG:  # for longer ones a thread is cheaper than a loop that stands still
            return Prompt(tokenizer.encode(text, special), text)
        if limited:
            self._check_least(text)
        return Prompt(await asyncio.to_thread(tokenizer.encode, text, special), text)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, limited: bool = True
    ) -> Prompt:
        """A conversation as a prompt. variables: further names that its template reads. limited: as above."""
        taken = sorted(_TEMPLATE_NAMES & variables.keys())
        if taken:
            raise RequestError(f"chat_template_kwargs may not set {', '.join(taken)}; leave it out.")
        return await asyncio.to_thread(self._chat_prompt, messages, variables, limited)

    def _chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], limited: bool
    ) -> Prompt:
        tokenizer = self.tokenizer
        hidden = render_chat(self.engine.engine.chat_template, tokenizer, messages, variables)
        text = tokenizer.stand_ins.show(hidden)
        if limited:
            self._check_least(text)
        return Prompt(tokenizer.encode_chat(hidden), text)

    def _check_least(self, text: str) -> None:
        self.check_length(self.tokenizer.least_tokens(text), least=True)

    async def generate(
        self, http: Request, prompts: Sequence[Prompt], sampling: SamplingParams, *, stream: bool, prefix: str
    ) -> Generation:
        """Begin to complete prompts. prefix: of the answer's id. Raises what the limits and the engine refuse."""
        for prompt in prompts:
            self.check_length(len(prompt.token_ids))
        if sampling.json_schema is not None:
            await self._check_schema(sampling.json_schema)
        self._check_room(len(prompts), sampling.n)  # the last before submit: nobody comes between
        name = f"{prefix}-{uuid.uuid4().hex}"
        jobs = [Job(f"{name}-{i}", prompt.token_ids, sampling, stream) for i, prompt in enumerate(prompts)]
        log = http.scope["state"]["log"]
        log |= {"completion": name}
        if self.config.log_prompts:
            log |= {"prompts": [prompt.text or list(prompt.token_ids) for prompt in prompts]}
        return Generation(name, await self.engine.submit(jobs), log)

    def check_count(self, num_prompts: int) -> None:
        """Raises APIError for more prompts than a request may have; before they are encoded."""
        most = self.config.max_prompts
        if num_prompts > most:
            raise APIError(400, f"{num_prompts} prompts in one request; at most {most}.", param="prompt")

    async def _check_schema(self, schema: Mapping[str, Any]) -> None:
        grammars = self.engine.engine.admission.grammars
        if grammars is None:
            raise RequestError("response_format needs a tokenizer, and this model has none; leave it out.")
        size = len(schema_text(schema))
        if size > _MOST_SCHEMA:
            raise RequestError(f"the JSON schema has {size} characters; this server takes at most {_MOST_SCHEMA}.")
        await asyncio.to_thread(grammars.check, schema)

    def check_length(self, length: int, *, least: bool = False) -> None:
        """Raises APIError for a prompt of more tokens than fit. least: it has so many or more."""
        limit = self.config.max_prompt_tokens
        if limit is not None and length > limit:
            message = f"the prompt has {'at least ' * least}{length} tokens; this server takes at most {limit}."
            raise APIError(400, message, code="context_length_exceeded")
        try:
            self.engine.engine.admission.check_length(length, least=least)
        except RequestError as error:
            raise APIError(400, str(error), code="context_length_exceeded") from error

    def _check_room(self, num_prompts: int, num_samples: int) -> None:
        config, wanted = self.config, num_prompts * num_samples
        if num_samples > config.max_n:
            raise APIError(400, f"n={num_samples} samples of a prompt; at most {config.max_n}.", param="n")
        if wanted > self._most_samples:
            raise APIError(400, f"{wanted} samples in one request; this server holds {self._most_samples}.", param="n")
        if self.draining:
            headers = {"Retry-After": "5"}
            raise APIError(503, "the server shuts down; ask another one.", code="draining", headers=headers)
        if self.engine.num_samples + wanted > self._most_samples:
            raise APIError(
                429,
                f"{self.engine.num_samples} samples run or wait, of at most {self._most_samples}; try again later.",
                code="rate_limit_exceeded",
                headers={"Retry-After": _RETRY_SECONDS},
            )


async def _merge(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    reads = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
    try:
        while reads:
            done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            for read in done:
                place = reads.pop(read)
                output = read.result()
                yield place, output
                if not output.finished:
                    reads[asyncio.ensure_future(anext(streams[place]))] = place
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


def _short_name(model: str) -> str:
    """A folder's last name: where it lies is nobody's business. Anything else as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model
