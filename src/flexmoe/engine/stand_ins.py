"""Stand-ins: what keeps special tokens that a message merely spells out apart from those that a chat template writes.

Enters: strings of a request, then the text that a template made of them. Leaves: token ids, in which the former are
plain text. So nobody who writes a message can end its turn.

Before the template runs, each special token spelt out in the request becomes two halves of surrogate pairs, which no
text has: a template may trim, cut, copy or drop what is around them, but not take them for its own words. Afterwards
every special token in the text counts as the template's, also one that it makes of pieces, where it deletes or changes
characters within a message or joins two without one between. Those become spellings that nobody can guess, and the
halves what they stood for; and a second tokenizer, which shares the model of the first, knows the guarded spellings as
its special tokens, and no others. So the whole text is encoded at once, as it would be if special tokens had other
names. Added tokens that the tokenizer does not call special, such as <think>, stay what they are.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import tokenizers

from flexmoe.errors import RequestError

_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")
_LOW = 1024  # lower halves


class StandIns:
    """Of all special tokens of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int, unknown: str | None = None) -> None:
        """vocab_size: above all ids. unknown: the token for what the vocabulary lacks."""
        added = backend.get_added_tokens_decoder()
        special = [(id_, token) for id_, token in sorted(added.items()) if token.special and token.content]
        self._spellings = [token.content for _, token in special]
        self._places = {spelling: place for place, spelling in enumerate(self._spellings)}
        self._special = _any_of(self._spellings)
        self._normalizer = backend.normalizer
        self._disguised = None if backend.normalizer is None else _any_of(_normalized(backend.normalizer, special))
        self._forbidden = {id_: token.content for id_, token in special if token.content != unknown}
        self._guarded = [_unguessable() for _ in special]
        self._backend, self._vocab_size, self._tokens = backend, vocab_size, special

    def hide(self, text: str) -> str:
        """The text with stand-ins for the special tokens that it spells out.

        Raises RequestError for a text that no tokenizer takes.
        """
        if half := _HALF.search(text):
            raise RequestError(
                f"the prompt cannot be encoded: character {half.start()} of a message is half a surrogate pair "
                f"({half[0]!r}); remove it."
            )
        if self._special is None:
            return text
        hidden = self._special.sub(lambda found: _pair(self._places[found[0]]), text)
        if self._disguised is not None:
            normal = self._normalizer.normalize_str(_PAIR.sub("\n", hidden))
            if found := self._disguised.search(normal):
                raise RequestError(
                    f"a message holds characters that the tokenizer takes for the special token {found[0]!r}; "
                    "spell it as it is, which is taken for text."
                )
        return hidden

    def show(self, text: str) -> str:
        """The text with the special tokens spelt out that stand-ins are there for."""
        return _PAIR.sub(lambda pair: self._spellings[_place(pair[0])], text)

    def encode(self, text: str) -> list[int]:
        """Token ids of what a template made of hidden strings.

        Raises RequestError where it cut a stand-in, and where the model itself makes special tokens of text.
        """
        assert self._special is not None, "without special tokens nothing is hidden"
        guarded = self._special.sub(lambda found: self._guarded[self._places[found[0]]], text)
        shown = self.show(guarded)
        if stands_in(shown):
            raise RequestError("the model's chat template cuts a special token that a message spells out; remove it.")
        # In a batch of one: only that leaves Python's lock to other threads meanwhile.
        twin, real = self._twin
        ids = twin.encode_batch_fast([shown], add_special_tokens=False)[0].ids
        if not self._forbidden.keys().isdisjoint(ids):
            found = next(self._forbidden[id_] for id_ in ids if id_ in self._forbidden)
            raise RequestError(f"this model's tokenizer cannot take {found!r} in a message for text; leave it out.")
        return [real.get(id_, id_) for id_ in ids]

    @cached_property
    def _twin(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The tokenizer that knows special tokens by their guarded spellings, and the ids that its own stand for."""
        backend = self._backend
        twin = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            twin.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            twin.pre_tokenizer = backend.pre_tokenizer
        known = self._vocab_size - backend.get_vocab_size(with_added_tokens=False)
        twin.add_tokens([_unguessable() for _ in range(known)])  # lest a new id be another token's
        added = sorted(backend.get_added_tokens_decoder().items())
        plain = [(id_, token) for id_, token in added if not token.special]
        twin.add_tokens([token for _, token in plain])
        twin.add_tokens([_guarded(name, token) for name, (_, token) in zip(self._guarded, self._tokens, strict=True)])
        real = {token.content: id_ for id_, token in plain}
        real |= {name: id_ for name, (id_, _) in zip(self._guarded, self._tokens, strict=True)}
        found = {twin.token_to_id(spelling): id_ for spelling, id_ in real.items()}
        return twin, {given: id_ for given, id_ in found.items() if given is not None}


def _normalized(normalizer: Any, special: Sequence[tuple[int, tokenizers.AddedToken]]) -> list[str]:
    """What those special tokens look like that are looked for in normalized text."""
    return [text for _, token in special if token.normalized and (text := normalizer.normalize_str(token.content))]


def _unguessable() -> str:
    return f"\ue000{secrets.token_hex(8)}\ue001"


def _guarded(name: str, token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(name, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)


def _any_of(spellings: Sequence[str]) -> re.Pattern[str] | None:
    """Finds the longest at a place, as the tokenizer itself does; None for no spellings."""
    return re.compile(_tree(spellings)) if spellings else None


def _tree(words: Sequence[str]) -> str:
    """A pattern that branches where words part: to try hundreds at each place of a long text would take seconds."""
    branches: dict[str, list[str]] = {}
    for word in words:
        if word:
            branches.setdefault(word[0], []).append(word[1:])
    options = [re.escape(first) + _tree(rest) for first, rest in branches.items()]
    pattern = options[0] if len(options) == 1 else f"(?:{'|'.join(options)})" if options else ""
    return f"(?:{pattern})?" if pattern and "" in words else pattern


def _pair(place: int) -> str:
    return chr(0xD800 + place // _LOW) + chr(0xDC00 + place % _LOW)


def _place(pair: str) -> int:
    return (ord(pair[0]) - 0xD800) * _LOW + ord(pair[1]) - 0xDC00


def stands_in(text: str) -> bool:
    """Whether there are stand-ins in a text."""
    return _HALF.search(text) is not None
