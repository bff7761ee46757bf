"""Token ids to text, one token at a time. Enters: ids in order. Leaves: text that no later token can change.

The pieces joined are what decoding the whole sequence at once gives, cut after the prompt's part. Each kind of decoder
in use has a stream that does constant work a token; any other falls back to decoding a short window of tokens twice.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from typing import Any, Protocol

from flexmoe.engine.tokenizer import Tokenizer

_INVALID = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE = re.compile(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?")


class TextStream(Protocol):
    """What the detokenizer needs."""

    def prime(self, prompt: Sequence[int]) -> None:
        """Take the prompt as context, in time that does not grow with it where the decoder allows. Call it first."""

    def feed(self, token_id: int) -> str:
        """Text that became certain with this token; often empty inside a character."""

    def finish(self) -> str:
        """Text still held back when no token follows."""


def text_stream(tokenizer: Tokenizer, skip_special_tokens: bool = True) -> TextStream:
    """The stream for this tokenizer's decoder."""
    steps = tokenizer.decoder_steps
    kinds = [step["type"] for step in steps]
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
    if kinds == ["ByteLevel"]:
        return _ByteLevelStream(tokenizer, skipped)
    if kinds == ["Metaspace"]:
        return _MetaspaceStream(tokenizer, skipped, steps[0])
    if kinds and _SENTENCEPIECE.fullmatch("".join(f"{kind} " for kind in kinds)) and _simple(steps):
        return _SentencePieceStream(tokenizer, skipped, steps)
    return _WindowStream(tokenizer, skip_special_tokens)


def _simple(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether every replacement is of a plain string, and only the start of the text is stripped."""
    plain = all("String" in step["pattern"] for step in steps if step["type"] == "Replace")
    return plain and all(step["stop"] == 0 for step in steps if step["type"] == "Strip")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where printable, else the next free one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class _TokenStream:
    """Spelling of visible tokens, for the streams below."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped

    def _spelling(self, token_id: int) -> str | None:
        return None if token_id in self._skipped else self._tokenizer.token(token_id)


class _ByteLevelStream(_TokenStream):
    """Every token is a string of bytes; text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        super().__init__(tokenizer, skipped)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def prime(self, prompt: Sequence[int]) -> None:
        """UTF-8 finds its feet within four bytes, so the end of the prompt is enough."""
        tail = b""
        for token_id in reversed(prompt):
            tail = self._bytes(token_id) + tail
            if len(tail) >= 4:
                break
        self._utf8.decode(tail)

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        return _bytes_of(self._spelling(token_id) or "")


@functools.lru_cache(maxsize=2**18)
def _bytes_of(spelling: str) -> bytes:
    """What a spelling in the byte alphabet stands for."""
    try:
        return bytes([_ALPHABET[char] for char in spelling])
    except KeyError:  # an added token, spelt in plain text
        return spelling.encode()


class _MetaspaceStream(_TokenStream):
    """A mark stands for each space; that of the very first token was put there by the encoder."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], step: dict[str, Any]) -> None:
        super().__init__(tokenizer, skipped)
        self._mark = step["replacement"]
        self._at_start = step.get("prepend_scheme", "always") != "never"

    def prime(self, prompt: Sequence[int]) -> None:
        if any(self._spelling(token_id) is not None for token_id in prompt):
            self._at_start = False

    def feed(self, token_id: int) -> str:
        spelling = self._spelling(token_id)
        if spelling is None:
            return ""
        space, self._at_start = "" if self._at_start else " ", False
        return spelling.replace(self._mark, space)

    def finish(self) -> str:
        return ""


class _ByteRun:
    """Neighbouring byte tokens. They are text if all of them together are UTF-8, else one U+FFFD each.

    So a character is certain only when the run ends; after LIMIT characters it is released all the same, lest a
    language that the vocabulary spells in bytes wait for the end of the sentence.
    """

    LIMIT = 32

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="strict")
        self._held = ""
        self._num_bytes = 0  # received since the last release
        self._broken = False

    def feed(self, byte: int) -> str:
        if self._broken:
            return _INVALID
        self._num_bytes += 1
        try:
            self._held += self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._broken = True
            return _INVALID * self._num_bytes
        return self.release() if len(self._held) >= self.LIMIT else ""

    def release(self) -> str:
        """The complete characters held, without waiting for the end."""
        text, self._held = self._held, ""
        self._num_bytes = len(self._utf8.getstate()[0])
        return text

    def forget(self) -> None:
        """What came so far is the prompt's own text."""
        self._held, self._num_bytes = "", 0

    def end(self) -> str:
        """The text that another kind of token, or the end, makes certain. The run starts anew."""
        text = _INVALID * self._num_bytes if self._utf8.getstate()[0] else self._held
        text = "" if self._broken else text
        self._utf8.reset()
        self._held, self._num_bytes, self._broken = "", 0, False
        return text


class _SentencePieceStream(_TokenStream):
    """Llama's decoder: marks become spaces, byte tokens characters, and the first space of the text goes."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], steps: Sequence[dict[str, Any]]) -> None:
        super().__init__(tokenizer, skipped)
        self._replace = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        strip = next((step for step in steps if step["type"] == "Strip"), None)
        self._strip_char: str = strip["content"] if strip else ""
        self._strip_left: int = strip["start"] if strip else 0
        self._run = _ByteRun()

    def prime(self, prompt: Sequence[int]) -> None:
        """The start of the prompt settles the stripping; a run of bytes at its end goes on in the output."""
        for token_id in prompt:
            self.feed(token_id)
            if not self._strip_left:
                self._run.end()
                self._prime_run(prompt)
                return
        self._strip(self._run.release())
        self._run.forget()

    def feed(self, token_id: int) -> str:
        spelling = self._spelling(token_id)
        if spelling is None:
            return ""
        byte = self._byte(spelling)
        if byte is not None:
            return self._strip(self._run.feed(byte))
        for old, new in self._replace:
            spelling = spelling.replace(old, new)
        return self._strip(self._run.end() + spelling)

    def finish(self) -> str:
        return self._strip(self._run.end())

    def _prime_run(self, prompt: Sequence[int]) -> None:
        run = []
        for token_id in reversed(prompt):
            spelling = self._spelling(token_id)
            byte = None if spelling is None else self._byte(spelling)
            if spelling is not None and byte is None:
                break
            run.append(byte)
        for byte in reversed(run):
            if byte is not None:
                self._run.feed(byte)
        self._run.forget()

    def _byte(self, spelling: str) -> int | None:
        match = _BYTE_TOKEN.fullmatch(spelling) if self._byte_fallback else None
        return int(match[1], 16) if match else None

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip_char:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class _WindowStream:
    """Any other decoder: decode the last few tokens with and without the newest, and give the difference."""

    WINDOW = 8

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._new: list[int] = []

    def prime(self, prompt: Sequence[int]) -> None:
        self._context = list(prompt[-self.WINDOW :])

    def feed(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._difference()
        if text.endswith(_INVALID) and len(self._new) < self.WINDOW:
            return ""
        if text:
            self._context, self._new = [*self._context, *self._new][-self.WINDOW :], []
        return text

    def finish(self) -> str:
        text, self._new = self._difference(), []
        return text

    def _difference(self) -> str:
        before = self._decode(self._context)
        return self._decode([*self._context, *self._new])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token adds to a text, in UTF-8; it may be part of a character. Special tokens are spelt out."""
    spelling = tokenizer.token(token_id) or ""
    if [step["type"] for step in tokenizer.decoder_steps] == ["ByteLevel"]:
        return _ByteLevelStream(tokenizer, frozenset())._bytes(token_id)
    byte = _BYTE_TOKEN.fullmatch(spelling)
    return bytes([int(byte[1], 16)]) if byte else spelling.replace("▁", " ").encode()
