"""An OpenAI server as its clients see it. Enters: where it is, and requests. Leaves: what it serves, and Answers.

Answers are streamed as server-sent events, and each piece of text is timed as it is read. With aiohttp a piece takes
less than half of the CPU time that it takes with httpx (about 45 and 115 µs, JSON included, at 16 streams), and a slow
client would be measured in place of the server. What is sent is made before the run, for the same reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flexmoe.bench.load import Planned, Prompt
from flexmoe.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import aiohttp

COMPLETIONS, CHAT = ENDPOINTS = ("completions", "chat")
_PATHS = {COMPLETIONS: "/v1/completions", CHAT: "/v1/chat/completions"}
_MOST_LINE_BYTES = 2**20
_MOST_MESSAGE = 200  # characters of what a server says of an error
# Less than uvicorn's 5 s: a request must not meet a connection that the server is just closing.
_KEEPALIVE_SECONDS = 3
_PROBE_SECONDS = 10
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """url: with or without /v1. model: None for the first that is served. timeout: seconds for an answer in all."""

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    endpoint: str = COMPLETIONS
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = True
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise ConfigError(f"endpoint={self.endpoint!r} is not one of {', '.join(ENDPOINTS)}.")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url={self.url!r} is no address of a server; use for instance http://127.0.0.1:8000.")

    @property
    def base(self) -> str:
        """Without a slash or /v1 at its end."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")


@dataclass(frozen=True, slots=True)
class Served:
    """model: the name to ask for. about: its entry of /v1/models. version: what /version tells, if it is there.

    engine: what FlexMoE's server says of its engine, its limits and its KV cache among it; None of another server.
    is_listed: False for a name that was given to a server which lists no models; `about` is empty then.
    """

    model: str
    about: dict[str, Any]
    version: Any
    engine: dict[str, Any] | None = None

    @property
    def is_listed(self) -> bool:
        return bool(self.about)

    @property
    def vocab_size(self) -> int | None:
        """Where the server tells it: FlexMoE does in the entry itself, llama.cpp under `meta`."""
        meta = self.about.get("meta")
        size = self.about.get("vocab_size") or (meta.get("n_vocab") if isinstance(meta, dict) else None)
        return size if isinstance(size, int) and size > 0 else None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as it is sent. due: see Planned."""

    number: int
    due: float | None
    body: bytes


@dataclass(slots=True)
class Answer:
    """What has come so far. texts: when each piece of text came, on time.perf_counter's clock.

    timings: seconds to the first token and between tokens, as FlexMoE's engine took them; empty of another server.
    """

    texts: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    is_done: bool = False

    def take(self, event: bytes, now: float) -> None:
        """Raises RequestFailed for an error of the server, and for what is no chunk of an answer."""
        if event == b"[DONE]":
            self.is_done = True
            return
        try:
            chunk = json.loads(event)
            if chunk.get("error"):
                raise RequestFailed("server error", _message(chunk))
            self.usage |= chunk.get("usage") or {}
            self.timings |= chunk.get("timings") or {}
            for choice in chunk.get("choices", ()):
                self._choice(choice, now)
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestFailed("bad answer", f"{_shortened(repr(event))} is no chunk of an answer") from error

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        part = choice.get("delta") or choice
        text = part.get("text") or part.get("content") or part.get("reasoning_content") or part.get("reasoning")
        # An answer of nothing but tokens without a text has a first moment, too: its end.
        if text or (self.finish_reason and not self.texts):
            self.texts.append(now)


class RequestFailed(Exception):  # noqa: N818 - an outcome to be counted, not an error of this program
    """A request without a complete answer. kind: under which it is counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


class Endpoint:
    """A pool of connections to one server, as many as are needed. An async context manager."""

    def __init__(self, options: EndpointOptions) -> None:
        """Raises MissingDependencyError without aiohttp."""
        try:
            import aiohttp
        except ModuleNotFoundError as error:
            raise MissingDependencyError("aiohttp", "bench", "`flexmoe bench serve`") from error
        self._http, self._options = aiohttp, options
        headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=options.timeout),
            headers=headers,
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    # ------------------------------------------------------------------ what is served

    async def served(self) -> Served:
        """Ask the server. Raises ConfigError if there is none, it refuses the key, or does not serve the model."""
        base = self._options.base
        status, answer = await self._get("/v1/models")
        if status in (401, 403):
            raise ConfigError(f"the server at {base} refuses the key (HTTP {status}); give the right one as --api-key.")
        models = answer.get("data") if status == 200 and isinstance(answer, dict) else None
        if models and all(isinstance(model, dict) and "id" in model for model in models):
            about = self._chosen(models)
        elif self._options.model is not None:
            about = {}
        else:
            raise ConfigError(f"{base}/v1/models gives no list of models (HTTP {status}); name one as --model.")
        status, version = await self._get("/version")
        name = str(about.get("id", self._options.model))
        return Served(name, about, version if status == 200 else None, await self._engine(about))

    async def _engine(self, about: dict[str, Any]) -> dict[str, Any] | None:
        if about.get("owned_by") != "flexmoe":
            return None
        status, told = await self._get("/v1/flexmoe/about")
        return told.get("engine") if status == 200 and isinstance(told, dict) else None

    def _chosen(self, models: list[dict[str, Any]]) -> dict[str, Any]:
        """The entry of the model that was named, or the first."""
        names, name = [str(model["id"]) for model in models], self._options.model
        if name is not None and name not in names:
            raise ConfigError(f"model={name!r} is not served at {self._options.base}; it serves {', '.join(names)}.")
        about = models[0 if name is None else names.index(name)]
        return {key: value for key, value in about.items() if key != "permission"}

    async def _get(self, path: str) -> tuple[int, Any]:
        """Status, and the JSON of the answer; None if it is none."""
        base = self._options.base
        timeout = self._http.ClientTimeout(total=_PROBE_SECONDS)
        try:
            async with self._session.get(base + path, timeout=timeout) as response:
                return response.status, _json(await response.read())
        except TimeoutError as error:
            raise ConfigError(f"the server at {base} does not answer {path} within {_PROBE_SECONDS} s.") from error
        except (self._http.ClientError, OSError, ValueError) as error:
            reason = getattr(error, "os_error", None) or error
            raise ConfigError(
                f"no server answers at {base} ({reason}); start one with `flexmoe serve`, or give its --url."
            ) from error

    # ------------------------------------------------------------------ a request

    def prepare(self, request: Planned, model: str) -> Prepared:
        """What is sent for a request. Raises ConfigError for a prompt that the endpoint does not take."""
        return Prepared(request.number, request.due, json.dumps(self._body(request, model)).encode())

    async def ask(self, request: Prepared, answer: Answer) -> None:
        """Send a request and fill in its answer as it comes. Raises RequestFailed."""
        await self._post(request.body, lambda response: _read_stream(response, answer))
        if not answer.is_done and answer.finish_reason is None:
            raise RequestFailed("cut off", "the stream ended before the answer did")

    async def ask_whole(self, request: Prepared) -> None:
        """The same in one piece, which nobody looks at. Raises RequestFailed."""
        body = json.loads(request.body) | {"stream": False}
        del body["stream_options"]
        await self._post(json.dumps(body).encode(), _read_whole)

    async def _post(self, body: bytes, read: Callable[[aiohttp.ClientResponse], Awaitable[None]]) -> None:
        url = self._options.base + _PATHS[self._options.endpoint]
        try:
            async with self._session.post(url, data=body, headers=_JSON) as response:
                await read(response)
        except TimeoutError as error:
            raise RequestFailed("timeout", f"no answer within {self._options.timeout:g} s") from error
        except self._http.ClientConnectorError as error:
            raise RequestFailed("no connection", _shortened(str(error.os_error))) from error
        except (self._http.ClientPayloadError, self._http.ServerDisconnectedError) as error:
            raise RequestFailed("cut off", "the connection ended before the answer did") from error
        except OSError as error:
            raise RequestFailed("cut off", _shortened(str(error) or type(error).__name__)) from error
        except self._http.ClientError as error:
            raise RequestFailed("bad answer", _shortened(str(error) or type(error).__name__)) from error

    def _body(self, request: Planned, model: str) -> dict[str, Any]:
        options = self._options
        body = {
            "model": model,
            "max_tokens": request.output_len,
            "temperature": options.temperature,
            "seed": options.seed + request.number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        return body | _asked(request.prompt, options.endpoint)


def _asked(prompt: Prompt, endpoint: str) -> dict[str, Any]:
    is_messages = isinstance(prompt, list) and isinstance(prompt[0], dict)
    if endpoint == COMPLETIONS and is_messages:
        raise ConfigError("a prompt of messages is for a chat; use --endpoint chat, or prompts of text or token ids.")
    if endpoint == COMPLETIONS:
        return {"prompt": prompt}
    if not is_messages and not isinstance(prompt, str):
        raise ConfigError("a chat takes no token ids; use --text, or --endpoint completions.")
    return {"messages": prompt if is_messages else [{"role": "user", "content": prompt}]}


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        said = _json(await response.read())
        raise RequestFailed(f"HTTP {response.status}", _message(said) if said else str(response.reason))


async def _read_whole(response: aiohttp.ClientResponse) -> None:
    await _check_status(response)
    await response.read()


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """Raises RequestFailed unless it is a stream of events."""
    await _check_status(response)
    if response.content_type != "text/event-stream":
        raise RequestFailed("bad answer", f"content type {response.content_type!r} in place of an event stream")
    async for events in _events(response.content):
        now = time.perf_counter()
        for event in events:
            answer.take(event, now)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[list[bytes]]:
    """The data of the events that came together."""
    rest = b""
    async for data in content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _MOST_LINE_BYTES:
            raise RequestFailed("bad answer", f"a line of more than {_MOST_LINE_BYTES >> 20} MiB")
        yield [line[5:].strip() for line in lines if line.startswith(b"data:")]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _message(said: Any) -> str:
    """The words in an error object, of which servers have several shapes."""
    error = said.get("error", said) if isinstance(said, dict) else said
    text = error.get("message", error) if isinstance(error, dict) else error
    return _shortened(str(text))


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_MESSAGE else line[: _MOST_MESSAGE - 1] + "…"
