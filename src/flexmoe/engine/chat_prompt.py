"""A conversation as a prompt. Enters: a template, a tokenizer, messages. Leaves: the prompt's text and token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexmoe.engine.chat_template import ChatTemplate, Message
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.errors import RequestError


def render_chat(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]
) -> str:
    """The text, for `Tokenizer.encode_chat`: with stand-ins for special tokens that the request spells out.

    variables: further names that the template reads. Raises RequestError.
    """
    stand_ins = tokenizer.stand_ins
    try:
        return template.render(messages, hide=stand_ins.hide, **variables)
    except RequestError as error:
        raise RequestError(stand_ins.show(str(error))) from error


def chat_prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, list[int]]:
    """Text and token ids. Special tokens in them are the template's; those that messages spell out are plain text."""
    hidden = render_chat(template, tokenizer, messages, {})
    return tokenizer.stand_ins.show(hidden), tokenizer.encode_chat(hidden)
