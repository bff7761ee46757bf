"""How many tokens a text has at least. Enters: a tokenizer, then texts. Leaves: a number, at once.

Encoding some megabytes takes seconds. No token covers more of a text than the longest one of the vocabulary, so that a
text far beyond the context is known for one by its length. That holds where nothing of a text is lost on its way and no
unknown token stands for a whole stretch of it; elsewhere nothing is known beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

# So many characters, or bytes, at most become one by Unicode's composition (NFC), and never of ASCII alone.
_COMPOSED = 4
_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation")


@dataclass(frozen=True, slots=True)
class TokenBound:
    """longest: what a token covers at most, in bytes or characters; 0 if that is not known. composes: has NFC."""

    longest: int
    in_bytes: bool = False
    composes: bool = False

    def least(self, text: str) -> int:
        """So many tokens or more."""
        if not self.longest:
            return 0
        size = len(text.encode("utf-8", "surrogatepass")) if self.in_bytes else len(text)
        each = self.longest * (_COMPOSED if self.composes and not text.isascii() else 1)
        return -(-size // each)


_UNKNOWN = TokenBound(0)


def bound_of(backend: tokenizers.Tokenizer) -> TokenBound:
    """What can be said of this tokenizer."""
    model, added = backend.model, backend.get_added_tokens_decoder().values()
    normalizers, splitters = _steps(backend.normalizer, "normalizers"), _steps(backend.pre_tokenizer, "pretokenizers")
    if not isinstance(model, models.BPE) or any(token.lstrip or token.rstrip for token in added):
        return _UNKNOWN
    if not all(map(_keeps_length, normalizers)) or not all(map(_keeps_all, splitters)):
        return _UNKNOWN
    composes = any(step["type"] == "NFC" for step in normalizers)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if any(step["type"] == "ByteLevel" for step in splitters) and vocabulary.keys() >= _ALPHABET:
        longest = max([*map(len, vocabulary), *(len(token.content.encode()) for token in added)])
        return TokenBound(longest, in_bytes=True, composes=composes)
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return TokenBound(max([*map(len, vocabulary), *(len(token.content) for token in added)]), composes=composes)
    return _UNKNOWN


def _keeps_length(normalizer: Mapping[str, Any]) -> bool:
    """Whether it makes nothing shorter, but for what is composed."""
    if normalizer["type"] == "Replace":
        old, new = normalizer["pattern"].get("String"), normalizer["content"]
        return old is not None and len(new) >= len(old) and len(new.encode()) >= len(old.encode())
    return normalizer["type"] in ("NFC", "Prepend")


def _keeps_all(splitter: Mapping[str, Any]) -> bool:
    return splitter["type"] in _KEEPING and splitter.get("behavior") != "Removed"


def _steps(component: Any, parts: str) -> list[dict[str, Any]]:
    """A normalizer or splitter as a flat list."""
    return [] if component is None else _flatten(json.loads(component.__getstate__()), parts)


def _flatten(step: dict[str, Any], parts: str) -> list[dict[str, Any]]:
    return [inner for part in step[parts] for inner in _flatten(part, parts)] if step["type"] == "Sequence" else [step]
