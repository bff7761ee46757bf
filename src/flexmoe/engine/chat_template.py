"""Messages to prompt text by the model's own Jinja template. Enters: role and content. Leaves: text to encode.

The text spells out every special token; `chat_prompt.py` encodes it so that those of the template are special, and no
others. Templates come with the model and are foreign code: they run in Jinja's sandbox and see plain values only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexmoe.engine.tokenizer import read_json
from flexmoe.errors import CheckpointError, RequestError

Message = Mapping[str, Any]

_NOT_ASCII = re.compile("[^\x00-\x7f\ud800-\udfff]+")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ChatTemplate:
    """The chat format of one model: a default template and, for some models, further named ones."""

    def __init__(self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """sources: the template, or templates by name ("default", "tool_use", ...); an empty mapping: none.

        special_tokens: variables such as `bos_token` and `eos_token`. Raises CheckpointError on a syntax error.
        """
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self._variables = dict(special_tokens or {})
        environment = _environment()
        self._templates = {name: _compile(environment, name, source) for name, source in self.sources.items()}

    @classmethod
    def from_folder(cls, path: str | Path, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """Read the template of a model folder: chat_template.jinja, else tokenizer_config.json."""
        return cls(_read_sources(Path(path)), special_tokens)

    def __bool__(self) -> bool:
        """Whether the model has a chat format at all."""
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        hide: Callable[[str], str] = str,
        **variables: Any,
    ) -> str:
        """Prompt text of a conversation.

        messages: mappings with `role` and `content` (a string, or text parts as in OpenAI's API).
        add_generation_prompt: end with the opening of an assistant turn. template: name of another than the
        default one. hide: what to do with each string of the request before the template sees it. variables: further
        names the template reads, such as `enable_thinking`.
        Raises RequestError, with the index of the message at fault where there is one.
        """
        chosen = self._choose(template, bool(tools))
        cleaned = [_clean(i, message, self.sources[chosen], hide) for i, message in enumerate(_as_list(messages))]
        values = {**self._variables, **_plain(variables, hide), "tools": _plain(tools, hide), "documents": None}
        values["add_generation_prompt"] = add_generation_prompt
        compiled = self._templates[chosen]
        try:
            return compiled.render(messages=cleaned, **values)
        except Exception as error:  # foreign code: whatever it raises is an answer to this request
            raise RequestError(_explain(compiled, cleaned, values, error)) from error

    def _choose(self, name: str | None, tools: bool) -> str:
        if not self._templates:
            raise RequestError("this model has no chat template; send a plain prompt instead of messages.")
        if name is None:
            name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise RequestError(f"this model has no chat template named {name!r}; it has {known}.")
        return name


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant says, for training; serving renders just its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads a class attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: block tags leave no white space, tojson escapes no HTML."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Halves of surrogate pairs are no text but stand-ins (stand_ins.py), to be replaced.
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # templates mean the local day


def _compile(environment: ImmutableSandboxedEnvironment, name: str, source: str) -> Template:
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise CheckpointError(f"chat template {name!r}, line {error.lineno}: {error.message}") from error


def _read_sources(folder: Path) -> dict[str, str]:
    """Templates by name. A chat_template.jinja replaces what tokenizer_config.json says, as in transformers."""
    sources: dict[str, str] = {}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        sources[file.stem] = file.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        return {**sources, "default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    if sources:
        return sources
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    found = found or read_json(folder / "chat_template.json").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, Mapping):
        return dict(found)
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in found}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: chat_template is neither text nor a list of name and template.") from error


def _as_list(messages: Sequence[Message]) -> list[Message]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        kind = type(messages).__name__
        raise RequestError(f"messages is a {kind}, not a list; use [{{'role': 'user', 'content': '...'}}].")
    if not messages:
        raise RequestError("messages is empty; send at least one.")
    return list(messages)


def _clean(index: int, message: object, source: str, hide: Callable[[str], str]) -> dict[str, Any]:
    """A checked copy made of plain values. Keys that hold None are dropped: templates ask whether a key exists."""
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{index}] is a {type(message).__name__}, not a mapping with role and content.")
    cleaned = {hide(str(key)): _plain(value, hide) for key, value in message.items() if value is not None}
    role = cleaned.get("role")
    if not isinstance(role, str) or not (role in _ROLES or f"'{role}'" in source or f'"{role}"' in source):
        raise RequestError(f"messages[{index}] has role {role!r}; use system, user, assistant or tool.")
    if "content" in cleaned:
        cleaned["content"] = _content(index, cleaned["content"])
    elif "tool_calls" not in cleaned:
        raise RequestError(f"messages[{index}] has no content; give it a string.")
    return cleaned


def _content(index: int, content: object) -> str:
    """One string. The text parts of OpenAI's list form are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = type(content).__name__
        raise RequestError(f"messages[{index}] has content of type {kind}; use a string or a list of text parts.")
    return "\n".join(_part(index, place, part) for place, part in enumerate(content))


def _part(index: int, place: int, part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(f"messages[{index}].content[{place}] is a {kind!r} part; this engine reads text parts only.")


def _plain(value: Any, hide: Callable[[str], str]) -> Any:
    """A copy of JSON-like data, so that a template never meets an object with methods of its own."""
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {hide(str(key)): _plain(item, hide) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, hide) for item in value]
    return hide(str(value))


def _explain(template: Template, messages: list[dict[str, Any]], values: dict[str, Any], error: Exception) -> str:
    """The template's complaint and the first message that brings it about."""
    text = str(error) or type(error).__name__
    # By halves: a template that refuses some messages refuses them also with more behind them. One that does not costs
    # a wrong number, not the time of rendering a long conversation again for each of its messages.
    accepted, refused = 0, len(messages)
    while refused - accepted > 1:
        middle = (accepted + refused) // 2
        try:
            template.render(messages=messages[:middle], **values)
        except Exception:  # noqa: BLE001  (any failure marks the message)
            refused = middle
        else:
            accepted = middle
    return f"messages[{refused - 1}] (role {messages[refused - 1]['role']!r}): {text}"
