"""Requests as OpenAI's API writes them, and vLLM's extensions. Enters: JSON. Leaves: checked fields, SamplingParams.

A field that nobody knows is refused. So is one that is known but not served, unless its value asks for nothing:
`Neutral` says which values do. `Ignored` fields have no part in the answer: they are for OpenAI's own accounting.

Of a long list, or of many fields, only the first that is wrong is told: a complaint about each of a million would take
minutes, while nobody else is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from flexmoe.config.sampling import SamplingParams

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters; a search is prepared for each, once a sample
MAX_FIELDS = 1024  # of an object, known or not, and entries of one whose keys are free
MAX_LOGPROBS = 20
MAX_ROUTED_TOKENS = 1024  # of a choice: tokens whose experts are told, the first ones


def _neutral(*values: object) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in (None, [], {}, *values):
            raise PydanticCustomError("unsupported", "is not supported by this server; leave it out.")
        return value

    return check


def _few(value: Any) -> Any:
    """Asked before each entry is looked at."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        message = f"Object should have at most {MAX_FIELDS} fields, not {len(value)}"
        raise PydanticCustomError("too_many_fields", message)
    return value


Few = BeforeValidator(_few)
Ignored = Annotated[Any, Field(description="Accepted; has no part in the answer.")]
Neutral = Annotated[Any, AfterValidator(_neutral()), Field(description="Not supported: null or empty only.")]
NeutralOff = Annotated[Any, AfterValidator(_neutral(False)), Field(description="Not supported: null or false only.")]
NeutralNone = Annotated[
    Any, AfterValidator(_neutral("none", "auto")), Field(description="Not supported: null, none or auto only.")
]
StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]


class Strict(BaseModel):
    """Refuses unknown fields, and values of another type than it names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    _few = model_validator(mode="before")(_few)


class StreamOptions(Strict):
    """include_usage: a last chunk tells the tokens used."""

    include_usage: bool = False
    include_obfuscation: NeutralOff = None


class JSONSchema(Strict):
    """A schema that the answer must follow."""

    name: Annotated[str, Field(max_length=256)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(Strict):
    """How the answer is bound: not at all, to any JSON object, to a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def schema_of(self) -> dict[str, Any] | None:
        """The schema that binds, None if there is none."""
        if self.type == "json_schema":
            return {} if self.json_schema is None else self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Common(Strict):
    """Fields of completions and chat completions alike. null means the default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Few, Field(max_length=MAX_FIELDS)] | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=1024)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    user: Ignored = None

    def sampling(self, **more: Any) -> SamplingParams:
        """The parameters of one prompt. more: those that each endpoint reads in its own way. Raises RequestError."""
        names = (
            "n temperature top_p stop seed presence_penalty frequency_penalty logit_bias top_k min_p "
            "repetition_penalty min_tokens stop_token_ids ignore_eos include_stop_str_in_output skip_special_tokens"
        )
        values = {name: getattr(self, name) for name in names.split()} | more
        if self.response_format is not None:
            values["json_schema"] = self.response_format.schema_of()
        values = {name: value for name, value in values.items() if value is not None or name == "max_tokens"}
        return SamplingParams(**values)

    @property
    def tells_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


TokenIds = Annotated[list[int], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Annotated[Any, AfterValidator(_neutral(""))] = None


Parts = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Message(BaseModel):
    """One turn of a conversation. Other fields than these go to the model's chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | Parts | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_routing: Annotated[bool | None, Field(description="Tell which experts are behind each token.")] = None
    tools: Neutral = None
    tool_choice: NeutralNone = None
    functions: Neutral = None
    function_call: NeutralNone = None
    modalities: Annotated[Any, AfterValidator(_neutral(["text"]))] = None
    audio: Neutral = None
    reasoning_effort: Annotated[Any, AfterValidator(_neutral("none"))] = None
    verbosity: Annotated[Any, AfterValidator(_neutral("medium"))] = None
    web_search_options: Neutral = None
    store: NeutralOff = None
    moderation: Neutral = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None


class TextFormat(Strict):
    """The `format` of a response's text; a schema stands beside its name here."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None

    def schema_of(self) -> dict[str, Any] | None:
        """The schema that binds, None if there is none."""
        if self.type == "json_schema":
            return self.schema_
        return {"type": "object"} if self.type == "json_object" else None


class TextOptions(Strict):
    """How the text of a response is bound."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, AfterValidator(_neutral("medium"))] = None


class InputItem(Strict):
    """One message of a response's input."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None


class ResponsesRequest(Strict):
    """POST /v1/responses: text in, text out. Nothing is kept, so nothing can be continued by its id."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[Any, AfterValidator(_neutral(0))] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    store: NeutralOff = None
    background: NeutralOff = None
    previous_response_id: Neutral = None
    conversation: Neutral = None
    prompt: Neutral = None
    include: Neutral = None
    tools: Neutral = None
    tool_choice: NeutralNone = None
    reasoning: Neutral = None
    max_tool_calls: Ignored = None
    truncation: Annotated[Any, AfterValidator(_neutral("disabled"))] = None
    parallel_tool_calls: Ignored = None
    metadata: Annotated[dict[str, str], Few] | None = None
    service_tier: Ignored = None
    user: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation in the model's chat format."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


class GenerateRequest(Strict):
    """POST /generate/, as FlexFlow's FastAPI examples have it."""

    prompt: Annotated[str, Field(min_length=1)]
    max_length: int | None = None
    max_new_tokens: int | None = None
