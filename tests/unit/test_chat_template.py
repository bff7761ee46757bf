"""ChatTemplate: where templates come from, what they may do, and errors that name the message at fault."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from flexmoe.engine.chat_template import ChatTemplate
from flexmoe.errors import CheckpointError, RequestError
from tests.chat_templates import CHATML, INSTRUCT, STYLES, TALKS

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


def test_chatml_word_for_word() -> None:
    text = ChatTemplate(CHATML).render([USER, REPLY, USER])
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(CHATML).render([USER], add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_special_tokens_are_variables() -> None:
    assert ChatTemplate(INSTRUCT, TOKENS).render([USER, REPLY]) == "<s> [INST] Hi [/INST] Hello</s>"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, "two", {"type": "text", "text": "three"}]
    rendered = ChatTemplate(CHATML).render([{"role": "user", "content": parts}])
    assert "user\none\ntwo\nthree<|im_end|>" in rendered


def test_variables_time_and_plain_values() -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd"

    template = ChatTemplate(
        "{{ messages[0].extra }}|{{ flag }}|{{ strftime_now('%Y') }}|{{ messages[0].many | tojson }}"
    )
    message = {**USER, "extra": Odd(), "many": ({"a": 1}, True, None)}
    year = datetime.now().strftime("%Y")
    assert template.render([message], flag=1) == f'odd|1|{year}|[{{"a": 1}}, true, null]'


# ------------------------------------------------------------------------------------------------- where from


def config(folder: Path, **fields: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_folder_without_a_template(tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(config(tmp_path))
    assert not template
    with pytest.raises(RequestError, match="this model has no chat template; send a plain prompt"):
        template.render([USER])


def test_template_in_the_config_and_in_a_file(tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(config(tmp_path, chat_template="config {{ bos_token }}"), TOKENS)
    assert template
    assert template.render([USER]) == "config <s>"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "file"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = ChatTemplate.from_folder(config(tmp_path, chat_template=named))
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=[{"name": "f"}]) == "tools"
    assert template.render([USER], template="tool_use") == "tools"
    with pytest.raises(RequestError, match="no chat template named 'rag'; it has default, tool_use"):
        template.render([USER], template="rag")


def test_further_templates_in_files(tmp_path: Path) -> None:
    config(tmp_path, chat_template="ignored")
    (tmp_path / "chat_template.jinja").write_text("main", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag", encoding="utf-8")
    template = ChatTemplate.from_folder(tmp_path)
    assert (template.render([USER]), template.render([USER], template="rag")) == ("main", "rag")


@pytest.mark.parametrize("found", [[{"name": "x"}], [7], 7])
def test_template_of_a_wrong_shape(tmp_path: Path, found: object) -> None:
    with pytest.raises(CheckpointError, match="neither text nor a list"):
        ChatTemplate.from_folder(config(tmp_path, chat_template=found))


def test_template_that_is_no_jinja() -> None:
    with pytest.raises(CheckpointError, match="chat template 'default', line 2: "):
        ChatTemplate("a\n{% if %}")


# ------------------------------------------------------------------------------------------------- bad messages


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("Hi", "messages is a str, not a list"),
        (USER, "messages is a dict, not a list"),
        ([USER, "Hi"], r"messages\[1\] is a str, not a mapping"),
        ([{"content": "Hi"}], r"messages\[0\] has role None"),
        (
            [USER, {"role": "usr", "content": "Hi"}],
            r"messages\[1\] has role 'usr'; use system, user, assistant or tool",
        ),
        ([USER, {"role": "assistant"}], r"messages\[1\] has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 7}], r"messages\[0\] has content of type int"),
        (
            [{"role": "user", "content": ["a", {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[1\] is a 'image_url' part; this engine reads text parts only",
        ),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(CHATML).render(messages)


def test_a_template_may_know_further_roles() -> None:
    message = {"role": "critic", "content": "Hm"}
    assert ChatTemplate("{% if messages[0].role == 'critic' %}yes{% endif %}").render([message]) == "yes"


@pytest.mark.parametrize(
    ("messages", "index"), [([USER, REPLY, REPLY], 2), ([REPLY], 0), ([USER, USER, REPLY, USER], 1)]
)
def test_the_template_refuses(messages: list[Any], index: int) -> None:
    want = rf"messages\[{index}\] \(role '{messages[index]['role']}'\): turns must alternate"
    with pytest.raises(RequestError, match=want):
        ChatTemplate(INSTRUCT, TOKENS).render(messages)


def test_the_template_refuses_the_whole() -> None:
    source = "{% if add_generation_prompt and messages|length < 2 %}{{ raise_exception('too few') }}{% endif %}"
    with pytest.raises(RequestError, match=r"messages\[0\] \(role 'user'\): too few"):
        ChatTemplate(source).render([USER])
    source = "{% if messages|length == 2 and messages[1].last is undefined %}{{ 1 / 0 }}{% endif %}"
    with pytest.raises(RequestError, match=r"messages\[1\] \(role 'assistant'\): division by zero"):
        ChatTemplate(source).render([USER, REPLY])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set n = namespace() %}{{ n.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.json }}",
    ],
)
def test_templates_are_locked_in(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source).render([USER])


@pytest.mark.parametrize("style", STYLES)
def test_messages_are_left_alone(style: str) -> None:
    talk = [dict(message) for message in TALKS["with system"]]
    ChatTemplate(STYLES[style], TOKENS).render(talk)
    assert talk == TALKS["with system"]
