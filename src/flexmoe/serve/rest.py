"""What FlexFlow's FastAPI examples answer. Enters: a model and a decoded JSON body. Leaves: the body of the answer.

No web framework: a server puts these behind `POST /generate/` and `POST /chat/completions`. They raise RequestError,
which means status 400.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexmoe.errors import RequestError
from flexmoe.serve.lengths import UNSET
from flexmoe.serve.llm import LLM

CHAT_TOKENS = 1024


def generate(llm: LLM, body: Mapping[str, Any]) -> dict[str, Any]:
    """{"prompt": text, "max_length"?, "max_new_tokens"?} -> {"prompt": text, "response": the text that follows it}.

    FlexFlow answers with what stands behind the first line break of prompt and completion, often nothing at all.
    """
    prompt = _get(body, "prompt", str)
    result = llm.generate(prompt, body.get("max_length", UNSET), body.get("max_new_tokens", UNSET))
    if not result:
        raise RequestError("prompt is empty; give at least one character.")
    text = str(result[0].output_text)
    start = _end_of_prompt(llm, prompt, text)
    return {"prompt": prompt, "response": text[start:]}


def chat(llm: LLM, body: Mapping[str, Any]) -> dict[str, Any]:
    """{"messages": [{"role", "content"}, ...], "max_new_tokens"?} -> {"response": text}.

    max_new_tokens is 1024 if not given, as in FlexFlow, or what max_seq_length allows.
    """
    messages = _get(body, "messages", list)
    if not messages:
        raise RequestError("messages is empty; send at least one.")
    asked = body.get("max_new_tokens")
    tokens = min(CHAT_TOKENS, llm.max_seq_length - 1) if asked is None else asked
    return {"response": str(llm.generate([messages], max_new_tokens=tokens)[0].output_text)}


def _get(body: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(body, Mapping):
        raise RequestError(f"the body is a JSON {type(body).__name__}, not an object.")
    if not isinstance(body.get(key), kind):
        raise RequestError(f"{key}={body.get(key)!r} is not a {'string' if kind is str else 'list'}.")
    return body[key]


def _end_of_prompt(llm: LLM, prompt: str, text: str) -> int:
    """Where the completion starts: behind the prompt as the tokenizer spells it, special tokens included."""
    tokenizer = llm.tokenizer
    spelled = tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=False)
    if text.startswith(spelled):
        return len(spelled)
    return text.find(prompt) + len(prompt) if prompt in text else 0
