"""LLM: the plain Python face. Enters: prompts and sampling parameters. Leaves: RequestOutput."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from types import TracebackType
from typing import Any, TypeAlias, TypeGuard

from flexmoe.config.model import ModelConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.admission import is_list
from flexmoe.engine.chat_prompt import chat_prompt
from flexmoe.engine.engine import Engine
from flexmoe.engine.outputs import RequestOutput
from flexmoe.engine.routing import RoutingRecorder, recording
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.errors import EngineError, RequestError, RequestFailedError
from flexmoe.planned import make_engine

Prompt: TypeAlias = str | Sequence[int]
Message: TypeAlias = Mapping[str, Any]


class LLM:
    """A model that generates text in this process. Threads may share it: they take turns, step by step.

    model: a folder, a Hugging Face hub id, or None for the built-in model. Options are those of `EngineConfig`'s
    parts by their flat names, e.g. `LLM("folder", dtype="float32", max_num_seqs=8, kv_cache_memory=2**30)`, and those
    of the planner: plan="auto", machine, workload, objective, search_budget (planned.py).

    Raises ConfigError for an option or config.json that cannot be served, CheckpointError for damaged files.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **options: Any) -> None:
        self._engine = make_engine({"model": model, **options})
        self._unseen: dict[str, RequestOutput | None] = {}  # by request: its latest output, until its caller has it
        self._turn = threading.RLock()  # reentrant: a forgotten stream is ended wherever it is collected

    @property
    def engine(self) -> Engine:
        """The engine underneath: add_request, step, abort."""
        return self._engine

    @property
    def config(self) -> ModelConfig:
        return self._engine.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError if the model came without one."""
        if self._engine.tokenizer is None:
            raise RequestError("this model has no tokenizer; give prompts as lists of token ids.")
        return self._engine.tokenizer

    def describe(self) -> dict[str, Any]:
        """Model, device, dtype, threads, backend and limits in force."""
        return self._engine.describe()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model expects."""
        return self.tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """A conversation as a prompt: its text and its token ids. Special tokens in these are the template's alone."""
        return chat_prompt(self._engine.chat_template, self.tokenizer, messages)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many, and return the outputs in their order.

        prompts: a string, a list of token ids, or a list of either. sampling_params: one for all, or one for each.
        Raises RequestError before anything is computed if any of them is refused.
        """
        listed = _as_prompts(prompts)
        params = _as_params(sampling_params, len(listed))
        return self._run([self._encode(prompt) for prompt in listed], params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many; a message is {"role": ..., "content": ...}.

        Special tokens that a message spells out are plain text in it.
        """
        conversations = messages if _holds_lists(messages) else [messages]
        params = _as_params(sampling_params, len(conversations))
        return self._run([self.encode_chat(c) for c in conversations], params)  # type: ignore[arg-type]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding the whole output so far after each step. Closing the iterator aborts it.

        The request starts with the first `next`. Several streams may be read in turns.
        """
        return self._stream(*self._encode(prompt), sampling_params)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one conversation like `stream`."""
        return self._stream(*self.encode_chat(messages), sampling_params)

    @contextmanager
    def record_routing(self, path: str | PathLike[str] | None = None) -> Iterator[RoutingRecorder]:
        """Within, count which experts tokens choose; afterwards write that to `path`, a JSON line for each MoE layer.

        What it yields tells the counts at any time.

        Raises ConfigError for a model without experts and for a file that cannot be written, EngineError if another
        recording is at work. After an error within, nothing is written.
        """
        with recording(self._engine, path) as recorder:
            yield recorder

    def close(self) -> None:
        """Free the model. May be called twice."""
        with self._turn:
            self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if not isinstance(prompt, str):
            return None, prompt
        if not prompt:
            raise RequestError("the prompt is an empty string; give at least one character.")
        return prompt, self.encode(prompt)

    def _run(
        self, prompts: Sequence[tuple[str | None, Sequence[int]]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        ids = [self._engine.new_id() for _ in prompts]
        try:
            with self._turn:
                for request_id, (text, tokens), sampling in zip(ids, prompts, params, strict=True):
                    self._unseen[request_id] = None
                    self._engine.add_request(tokens, sampling, prompt=text, request_id=request_id)
            return [self._next(request_id) for request_id in ids]
        finally:
            self._end(ids)

    def _stream(
        self, text: str | None, tokens: Sequence[int], sampling: SamplingParams | None
    ) -> Iterator[RequestOutput]:
        params = SamplingParams() if sampling is None else sampling
        request_id = self._engine.new_id()
        try:
            with self._turn:
                self._unseen[request_id] = None
                self._engine.add_request(tokens, params, prompt=text, request_id=request_id, stream=True)
            finished = False
            while not finished:
                output = self._next(request_id)
                finished = output.finished
                yield output
        finally:
            self._end([request_id])

    def _end(self, ids: Sequence[str]) -> None:
        """Whatever happened, nothing of these requests is left."""
        with self._turn:
            self._engine.discard(ids)
            for request_id in ids:
                self._unseen.pop(request_id, None)

    def _next(self, request_id: str) -> RequestOutput:
        """Step until this request has something new."""
        while (output := self._take(request_id)) is None:
            pass
        if output.error is not None:
            raise RequestFailedError(output.error)
        return output

    def _take(self, request_id: str) -> RequestOutput | None:
        """What this request has that is new, if need be after a step. What others get by it is kept for them."""
        with self._turn:
            if self._unseen[request_id] is None:
                for new in self._engine.step():
                    if new.request_id in self._unseen:
                        self._unseen[new.request_id] = new
                if self._unseen[request_id] is None and not self._engine.serves(request_id):
                    raise EngineError(f"request {request_id!r} was aborted while its output was awaited.")
            output, self._unseen[request_id] = self._unseen[request_id], None
            return output


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not is_list(prompts):
        raise RequestError(f"prompts={prompts!r} is neither a string, a list of token ids, nor a list of these.")
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not is_list(prompt):
            raise RequestError(f"prompt {index} is {prompt!r}; use a string or a list of token ids.")
    return list(prompts)  # type: ignore[arg-type]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not is_list(params):
        raise RequestError(f"sampling_params={params!r} is neither SamplingParams nor a list of them.")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts; give one for all or one for each.")
    return list(params)


def _holds_lists(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> TypeGuard[Sequence[Sequence[Message]]]:
    """Whether these are several conversations, not the messages of one."""
    return is_list(messages) and len(messages) > 0 and is_list(messages[0])
