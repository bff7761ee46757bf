"""The one chat format: rendered in Python for training, as a Jinja template for everybody who uses the model.

In: a list of messages (role, content). Out: text with the special tokens spelt out, or the template's source.
Both spellings must give the same text; `tests/cpu/test_builtin_model.py` compares them.
"""

from collections.abc import Sequence
from typing import TypedDict

PAD, BOS, EOS, USER_START, USER_END = "<pad>", "<s>", "</s>", "[INST]", "[/INST]"
SPECIAL_TOKENS = (PAD, BOS, EOS, USER_START, USER_END)  # ids 0 to 4; BOS = 1 and EOS = 2 as in Mixtral


class Message(TypedDict):
    """One turn: role is "system" (first only), "user" or "assistant"."""

    role: str
    content: str


# No blanks around the content: an answer then starts at its first letter and needs no stripping.
CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] + '\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] -%}
    {{- raise_exception('Roles must alternate user, assistant, user, ... after an optional first system message.') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- '[INST]' + (system if loop.first else '') + message['content'] + '[/INST]' -}}
  {%- else -%}
    {{- message['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}"""


def render(messages: Sequence[Message]) -> str:
    """Text of a conversation, as the template renders it (`<s>[INST]q[/INST]a</s>[INST]...`)."""
    system = ""
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"] + "\n\n", messages[1:]
    parts = [BOS]
    for index, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise ValueError(f"message {index} has role {message['role']!r}; roles must alternate, user first")
        if message["role"] == "user":
            parts.append(f"{USER_START}{system if index == 0 else ''}{message['content']}{USER_END}")
        else:
            parts.append(message["content"] + EOS)
    return "".join(parts)
