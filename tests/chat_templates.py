"""Chat templates in the styles in use, written for the tests: what they rely on is what the renderer must offer."""

from __future__ import annotations

from typing import Any

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' -}}
{% endif %}
"""

# Mixtral's: turns must alternate, begin and end tokens come from the tokenizer, `-` eats white space.
INSTRUCT = """{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content ~ '\n\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{{- bos_token -}}
{%- for turn in turns -%}
  {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('turns must alternate between user and assistant') -}}
  {%- endif -%}
  {%- if turn.role == 'user' -%}{{- ' [INST] ' ~ (system if loop.first else '') ~ turn.content ~ ' [/INST]' -}}
  {%- else -%}{{- ' ' ~ turn.content ~ eos_token -}}{%- endif -%}
{%- endfor -%}"""

# Llama 3's: headers, tools as JSON, a namespace, loop controls, a macro, variables with defaults, generation marks.
HEADERS = """{{- bos_token }}
{%- macro header(role) %}{{ '<|start|>' ~ role ~ '<|sep|>\n\n' }}{% endmacro %}
{%- set found = namespace(system=none) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{%- set found.system = message['content'] %}{%- break %}{%- endif %}
{%- endfor %}
{%- if tools %}
{{- header('system') }}{{ (found.system or 'You have tools.') | trim }}
{% for tool in tools %}
{{ tool | tojson(indent=2) }}
{% endfor %}<|end|>
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and tools %}{% continue %}{% endif %}
    {{- header(message.role) }}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
    {%- else %}
        {%- generation %}{{- message.content | trim }}{% endgeneration %}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if thinking is defined and thinking %}{{- '<think>' }}{%- endif %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}"""

STYLES = {"chatml": CHATML, "instruct": INSTRUCT, "headers": HEADERS}

TALKS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": 'Hello <b>&amp;</b> "you" 你好'}],
    "with system": [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!", "name": None},
        {"role": "user", "content": "  What is\n\n  a router?  "},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "Wie ist's in <Köln>?", "parameters": {}}}]
TOOL_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "wetter", "arguments": {"ort": "Köln"}}}]},
    {"role": "tool", "content": "rain"},
]
