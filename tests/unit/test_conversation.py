"""Conversation: turns, what is dropped when the context is full, and what is kept when a message is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from flexmoe.cli.conversation import Conversation, Message
from flexmoe.errors import RequestError


def encode(messages: Sequence[Message]) -> list[int]:
    """A token a character."""
    return list("".join(message["content"] for message in messages).encode())


def talk(*texts: str, system: str | None = None) -> Conversation:
    conversation = Conversation(system)
    for number, text in enumerate(texts):
        conversation.answer(text) if number % 2 else conversation.ask(text)
    return conversation


def test_messages() -> None:
    conversation = talk("q1", "a1", "q2", system="s")
    roles = [(message["role"], message["content"]) for message in conversation.messages]
    assert roles == [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2")]
    assert conversation.take_back() == "q2"
    assert len(conversation) == 1
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "s"}]
    assert conversation.take_back() is None


def test_oldest_turns_are_dropped() -> None:
    conversation = talk("aa", "AA", "bb", "BB", "cc", system="ss")
    assert conversation.fit(encode, context=20, answer=8) == (list(b"ssaaAAbbBBcc"), 0)
    assert conversation.fit(encode, context=20, answer=9) == (list(b"ssbbBBcc"), 1)
    assert conversation.fit(encode, context=8, answer=4) == (list(b"sscc"), 1)
    assert [message["content"] for message in conversation.messages] == ["ss", "cc"]


def test_the_last_question_may_leave_little_room() -> None:
    assert talk("abcdefg").fit(encode, context=8, answer=4) == (list(b"abcdefg"), 0)


def test_a_question_that_fills_the_context_is_refused_and_the_turns_stay() -> None:
    conversation = talk("aa", "AA", "abcdefgh")
    with pytest.raises(RequestError, match="prompt of 8 tokens, which fills the context of 8; shorten it"):
        conversation.fit(encode, context=8, answer=4)
    assert len(conversation) == 2


def test_save(tmp_path: Path) -> None:
    conversation = talk("q", "ä")
    conversation.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == conversation.messages
    with pytest.raises(RequestError, match=r"cannot be written: No such file or directory\."):
        conversation.save(tmp_path / "no" / "talk.json")
