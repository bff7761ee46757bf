"""Answers as OpenAI's API writes them, for the OpenAPI page; the endpoints build them as plain dictionaries."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from flexmoe.server.errors import ErrorObject

Finish = Literal["stop", "length"] | None


class PromptDetails(BaseModel):
    """cached_tokens: prompt tokens whose keys and values were in the cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    """One entry a token. text_offset: where it begins in the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One sample. stop_reason: the stop string or stop token id that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    stop_reason: int | str | None = None


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[TokenLogprob]


class RoutedToken(BaseModel):
    """A token, and by MoE layer the experts behind it with their shares."""

    token: str
    experts: list[list[int]]
    weights: list[list[float]]


class Routing(BaseModel):
    """Of the first tokens of a choice; layers: numbers of the MoE layers."""

    layers: list[int]
    tokens: list[RoutedToken]


class ChatMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One sample."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    routing: Routing | None = None
    finish_reason: Finish
    stop_reason: int | str | None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ResponseReply(BaseModel):
    """The answer of /v1/responses: one message of text. status: completed, or incomplete if it was cut at a limit."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: dict[str, Any]
    error: None
    incomplete_details: dict[str, str] | None


class ModelCard(BaseModel):
    """A model that is served. max_model_len: tokens of prompt and answer together. vocab_size: ids are below it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    vocab_size: int


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(BaseModel):
    """Token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(BaseModel):
    """Text of token ids."""

    prompt: str


class GenerateReply(BaseModel):
    """FlexFlow's answer: the prompt, and what follows it."""

    prompt: str
    response: str


class HealthReply(BaseModel):
    """status: ok, draining, hung or dead. reason: why it is hung."""

    status: str
    reason: str | None = None


class ExpertsReply(BaseModel):
    """placements: by MoE layer, the experts in the slots of each rank; null for one rank."""

    layers: list[int]
    num_experts: int
    top_k: int
    placements: list[list[list[int]]] | None


class CompareReply(BaseModel):
    """The engine that the page compares with. kind: hf, or url."""

    kind: Literal["hf", "url"]
    name: str


class AboutReply(BaseModel):
    """engine: what it runs with. kernels: by operation. latency_bounds: of the histograms in the live figures."""

    version: str
    model: str
    engine: dict[str, Any]
    kernels: dict[str, str]
    experts: ExpertsReply | None
    latency_bounds: dict[str, list[float]]
    compare: CompareReply | None


class VersionReply(BaseModel):
    """FlexMoE's version."""

    version: str


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers errors with these statuses beside those that every route may give."""
    return {status: {"model": ErrorObject} for status in (401, 500, 503, *statuses)}


_EVENT = {
    "type": "object",
    "description": "A server-sent event; data is JSON, or [DONE].",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}


def generated(reply: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that generates text, at once or as events."""
    return {200: {"model": reply, "content": EVENTS}, **errors(400, 404, 408, 413, 415, 429, 501)}
