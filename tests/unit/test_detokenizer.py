"""Detokenizer: pieces joined are the whole decoded at once; stop strings are found exactly, however tokens fall."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.detokenizer import Detokenizer
from flexmoe.engine.token_text import _ByteRun
from flexmoe.engine.tokenizer import Tokenizer
from tests.tokenizer_folders import CONFIG, KINDS

EXACT = ("byte_level", "sentencepiece", "gemma", "metaspace")
TOKENIZERS = {kind: Tokenizer(make(), CONFIG) for kind, make in KINDS.items()}
PROMPTS = ["", " ", "Hello", "<s>Hello world,", "[INST]Once upon[/INST]"]
WORDS = st.sampled_from(
    ["Hello", " world", "🐦", "🍕🐦", "你好", "日本語", " café", "\n", "  ", "é", "한국어", "[INST]"]
)


def detokenizer(kind: str, prompt: str | list[int] = "", **options: object) -> Detokenizer:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return Detokenizer(tokenizer, ids, SamplingParams.from_options(options))


def stream(detok: Detokenizer, ids: list[int], sizes: random.Random | None = None) -> list[str]:
    pieces, at = [], 0
    while at < len(ids):
        step = sizes.randint(1, 4) if sizes else 1
        pieces.append(detok.append(ids[at : at + step]))
        at += step
    return [*pieces, detok.flush()]


def expected(kind: str, prompt: str, ids: list[int], skip: bool) -> str:
    tokenizer = TOKENIZERS[kind]
    before = tokenizer.encode(prompt)
    start = tokenizer.decode(before, skip)
    whole = tokenizer.decode([*before, *ids], skip)
    assert whole.startswith(start)
    return whole[len(start) :]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), prompt=st.sampled_from(PROMPTS), skip=st.booleans(), seed=st.integers(0, 9))
def test_pieces_joined_are_the_whole(kind: str, data: st.DataObject, prompt: str, skip: bool, seed: int) -> None:
    """Any ids: half characters, byte tokens that are no text, special tokens, ids without a token."""
    ids = data.draw(st.lists(st.integers(0, TOKENIZERS[kind].vocab_size + 3), max_size=24))
    detok = detokenizer(kind, prompt, skip_special_tokens=skip)
    pieces = stream(detok, ids, random.Random(seed))
    assert "".join(pieces) == detok.text == expected(kind, prompt, ids, skip)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=100, deadline=None)
@given(words=st.lists(WORDS, max_size=8), prompt=st.sampled_from(PROMPTS))
def test_text_with_emoji_and_cjk(kind: str, words: list[str], prompt: str) -> None:
    ids = TOKENIZERS[kind].encode("".join(words), add_special_tokens=False)
    pieces = stream(detokenizer(kind, prompt), ids)
    assert "".join(pieces) == expected(kind, prompt, ids, True)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("prompt", ["Hello", "[INST]Once upon[/INST]"])
def test_a_decoder_without_a_stream_of_its_own(prompt: str) -> None:
    ids = TOKENIZERS["word_piece"].encode("the little bird flying high", add_special_tokens=False)
    assert "".join(stream(detokenizer("word_piece", prompt), ids)) == " the little bird flying high"


def test_a_character_begun_in_the_prompt_is_finished() -> None:
    for kind in ("byte_level", "sentencepiece"):
        tokenizer = TOKENIZERS[kind]
        ids = tokenizer.encode("Hello " + "𓀀", add_special_tokens=False)
        assert tokenizer.decode(ids[:-2]).endswith("\ufffd")
        detok = detokenizer(kind, ids[:-2])
        assert [detok.append([ids[-2]]), detok.append([ids[-1]]) + detok.flush()] == ["", "𓀀"]


def test_no_half_character_is_shown() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("𓀀a", add_special_tokens=False)
    pieces = stream(detokenizer("sentencepiece", "Hello"), ids)
    assert [piece for piece in pieces if piece] == [" ", "𓀀a"]


def test_long_runs_of_byte_tokens_flow() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    text = "ประเทศไทยมีเมืองหลวงคือกรุงเทพมหานคร" * 3
    ids = tokenizer.encode(text, add_special_tokens=False)[1:]  # without the space
    pieces = stream(detokenizer("sentencepiece", "Hello"), ids)
    assert "".join(pieces) == text
    assert max(len(piece) for piece in pieces) <= _ByteRun.LIMIT


def test_constant_work_a_token() -> None:
    """Fifty times the tokens take about fifty times as long, with a prompt of any length."""
    seconds = []
    ids = TOKENIZERS["byte_level"].encode("Hello world 🐦 ", add_special_tokens=False)
    for repeats in (100, 5000):
        detok = detokenizer("byte_level", ids * 1000, stop=["never to be found"])
        start = time.thread_time()
        stream(detok, ids * repeats)
        seconds.append(time.thread_time() - start)
    assert seconds[1] < 250 * seconds[0]


# ---------------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abc ", max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
    seed=st.integers(0, 9),
)
def test_stop_strings(kind: str, text: str, stops: list[str], include: bool, seed: int) -> None:
    """Against the definition: the shortest beginning of the text that ends with a stop string, the longest of them."""
    ids = TOKENIZERS[kind].encode(text, add_special_tokens=False)
    whole = expected(kind, "Hello", ids, True)
    ends = (end for end in range(1, len(whole) + 1) if whole[:end].endswith(tuple(stops)))
    end = next(ends, None)
    want, stop = whole, None
    if end is not None:
        stop = max((s for s in stops if whole[:end].endswith(s)), key=len)
        want = whole[:end] if include else whole[: end - len(stop)]
    detok = detokenizer(kind, "Hello", stop=stops, include_stop_str_in_output=include)
    pieces = stream(detok, ids, random.Random(seed))
    assert ("".join(pieces), detok.text, detok.stopped_by) == (want, want, stop)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detok = detokenizer("byte_level", stop=["###"])
    pieces = [detok.append(tokenizer.encode(text, add_special_tokens=False)) for text in ("a#", "#", "b##", "##c", "d")]
    assert pieces == ["a", "", "##b", "", ""]
    assert (detok.stopped_by, detok.text, detok.flush()) == ("###", "a##b", "")


def test_flush_releases_what_was_held() -> None:
    detok = detokenizer("byte_level", stop=["world!"])
    assert detok.append(TOKENIZERS["byte_level"].encode("Hello world", add_special_tokens=False)) == "Hello "
    assert detok.flush() == "world"
    assert (detok.text, detok.stopped_by, detok.flush()) == ("Hello world", None, "")


def test_flush_may_complete_a_stop_string() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    detok = detokenizer("sentencepiece", "Hello", stop=["𓀀"])
    assert detok.append(tokenizer.encode("world𓀀", add_special_tokens=False)) == " world"
    assert detok.stopped_by is None  # the run of bytes could go on and turn out to be no text
    assert detok.flush() == ""
    assert detok.stopped_by == "𓀀"


def test_min_tokens_lets_stop_strings_pass() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a;b;c;d", add_special_tokens=False)
    assert len(ids) == 7
    for least, text in ((0, "a"), (2, "a"), (3, "a;b"), (5, "a;b;c"), (7, "a;b;c;d")):
        detok = detokenizer("byte_level", stop=";", min_tokens=least)
        assert "".join(stream(detok, ids)) == text


def test_a_long_stop_string_is_no_burden() -> None:
    detok = detokenizer("byte_level", stop=["a" * 5000 + "b"])
    ids = TOKENIZERS["byte_level"].encode("a" * 20000, add_special_tokens=False)
    start = time.thread_time()
    assert len("".join(stream(detok, ids))) == 20000
    assert time.thread_time() - start < 5
