"""How many tokens a text has at least: never more than it has, and much where the text is long."""

from __future__ import annotations

import sys
import threading
import time
import unicodedata
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from flexmoe.engine import token_bound
from flexmoe.engine.token_bound import bound_of
from flexmoe.engine.tokenizer import LONG, Tokenizer
from tests.tokenizer_folders import KINDS, TEXTS, byte_level, sentencepiece

KNOWN = ["byte_level", "sentencepiece", "gemma"]
WORDS = st.sampled_from(
    [*TEXTS[:3], "Hello", "[INST]", "<tool> 你好", " ", "    ", "\n", "é", "e\u0301", "\u212a", "🐦", "x"]
)


@pytest.mark.parametrize("kind", KNOWN)
@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, max_size=40))
def test_never_more_than_there_are(kind: str, words: list[str]) -> None:
    backend = KINDS[kind]()
    text = "".join(words)
    assert bound_of(backend).least(text) <= len(backend.encode(text, add_special_tokens=False).ids)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, max_size=40))
def test_never_more_where_characters_are_composed(words: list[str]) -> None:
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFC()])
    text = "".join(words)
    assert bound_of(backend).least(text) <= len(backend.encode(text).ids)
    assert bound_of(backend).least("e\u0301" * 10_000) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_known_to_be_long(kind: str) -> None:
    bound = bound_of(KINDS[kind]())
    least = bound.least("x" * 10**6)
    assert (least >= 10**6 / bound.longest > 10**4) if kind in KNOWN else least == 0


def test_composition_makes_four_characters_one_at_most() -> None:
    for code in range(sys.maxunicode + 1):
        parts = unicodedata.normalize("NFD", chr(code))
        whole = unicodedata.normalize("NFC", parts)
        assert len(parts) <= token_bound._COMPOSED * len(whole)
        if not 0xD800 <= code < 0xE000:
            assert len(parts.encode()) <= token_bound._COMPOSED * len(whole.encode())
            assert len(chr(code).encode()) <= token_bound._COMPOSED * len(whole.encode())


def changed(**parts: Any) -> tokenizers.Tokenizer:
    backend = byte_level()
    for name, value in parts.items():
        setattr(backend, name, value)
    return backend


def split_by(splitter: Any) -> tokenizers.Tokenizer:
    return changed(pre_tokenizer=pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel()]))


def with_token(**flags: bool) -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.add_tokens([AddedToken("<mask>", **flags)])
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Replace("aa", "b")),
        changed(normalizer=normalizers.Replace(tokenizers.Regex("a+"), "bbb")),
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])),
        changed(
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
        ),
        changed(pre_tokenizer=pre_tokenizers.Digits()),  # then other characters are unknown
        changed(model=models.BPE({"a": 0}, [])),
        with_token(lstrip=True),
        with_token(rstrip=True),
    ],
)
def test_where_text_may_be_lost_nothing_is_known(backend: tokenizers.Tokenizer) -> None:
    assert bound_of(backend).least("x" * 10**6) == 0
    assert bound_of(byte_level()).least("x" * 10**6) > 0


def test_short_texts_are_not_judged() -> None:
    tokenizer = Tokenizer(sentencepiece())
    assert tokenizer.least_tokens("x" * LONG) == 0
    assert 0 < tokenizer.least_tokens("x" * (LONG + 1)) <= LONG


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_get_the_same_ids_as_short_ones(kind: str) -> None:
    backend = KINDS[kind]()
    text = " ".join([*TEXTS, "[INST] 你好 🐦"])
    assert len(text) <= LONG
    for add in (True, False):
        want = backend.encode(text * 5, add_special_tokens=add).ids
        assert Tokenizer(backend).encode(text * 5, add) == want


def test_others_go_on_while_a_long_text_is_encoded() -> None:
    tokenizer, text, turns = Tokenizer(byte_level()), "Hello world, this is " * 50_000, 0
    thread = threading.Thread(target=tokenizer.encode, args=[text])
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10
