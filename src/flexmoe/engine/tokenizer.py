"""Text to token ids and back. Enters: a model folder with tokenizer.json. Leaves: ids, text, and the special tokens.

tokenizer.json is the truth: normaliser, merges, the begin-of-sequence token and the decoder all come from it, as in
transformers 5, which ignores `add_bos_token` of tokenizer_config.json wherever a tokenizer.json exists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from flexmoe.engine.stand_ins import StandIns, stands_in
from flexmoe.engine.token_bound import TokenBound, bound_of
from flexmoe.errors import CheckpointError, RequestError

# Characters of texts that are encoded in a moment.
LONG = 2000
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONVERT = (
    'convert it once: pip install transformers sentencepiece protobuf && python -c "from transformers import '
    "AutoTokenizer; AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
)


class Tokenizer:
    """A Hugging Face `tokenizers` tokenizer with the names of its special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        """`config` holds the fields of tokenizer_config.json; both may be made by hand in tests."""
        config = config or {}
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = {name: _content(config[name]) for name in _NAMED if config.get(name)}
        _declare_added_tokens(backend, config, self.special_tokens)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._spellings: dict[int, str | None] = {}
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and special_tokens_map.json of a model folder.

        Raises CheckpointError if the folder has no tokenizer.json (with the way to make one) or a damaged one.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(_missing_message(folder))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception, with the place in the file as its text
            raise CheckpointError(f"{file} is not a tokenizer file: {error}.") from error
        return cls(backend, read_tokenizer_config(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens spelt out in the text become their ids.

        add_special_tokens: put the begin-of-sequence token (or what the model was trained with) around the text.
        """
        try:
            if len(text) > LONG:  # in a batch of one: only that leaves Python's lock to other threads meanwhile
                batch = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                ids: list[int] = batch[0].ids
            else:
                ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"the prompt cannot be encoded: {_why_not_text(text)}") from error
        return ids

    def least_tokens(self, text: str) -> int:
        """So many token ids or more, if the text is a long one. Tells at once what would take seconds to encode."""
        return self._bound.least(text) if len(text) > LONG else 0

    def encode_chat(self, hidden: str) -> list[int]:
        """Token ids of what `chat_prompt.render_chat` gave: a text with all its special tokens, and with stand-ins."""
        return self.stand_ins.encode(hidden) if stands_in(hidden) else self.encode(hidden, add_special_tokens=False)

    @cached_property
    def stand_ins(self) -> StandIns:
        """For special tokens that messages spell out."""
        unknown = self.special_tokens.get("unk_token") or getattr(self.backend.model, "unk_token", None)
        return StandIns(self.backend, self.vocab_size, unknown)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids without a token (padding of the embedding table) are left out."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of one token (`▁the`, `Ġthe`, `<0x0A>`), None if the id has none."""
        if token_id not in self._spellings:  # asked for each token of each answer
            self._spellings[token_id] = self.backend.id_to_token(token_id)
        return self._spellings[token_id]

    @cached_property
    def decoder_steps(self) -> list[dict[str, Any]]:
        """The decoder of tokenizer.json as a flat list of its steps; empty if it has none."""
        decoder = self.backend.decoder
        return [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))

    @cached_property
    def _bound(self) -> TokenBound:
        return bound_of(self.backend)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Fields of tokenizer_config.json, completed by those of the older special_tokens_map.json."""
    config = read_json(folder / "tokenizer_config.json")
    return {**read_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file. Raises CheckpointError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, not an object.")
    return value


def _declare_added_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Declare the tokens that only the config knows, so that they are found in text and skipped when decoding.

    A named special token that the vocabulary lacks is not declared: it would get an id beyond the embeddings.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, fields in sorted(declared.items(), key=lambda item: int(item[0])):
        if fields["content"] not in known:
            backend.add_tokens([_added_token(fields)])
            known.add(fields["content"])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else extra
    special = [*named.values(), *(_content(token) for token in extra)]
    backend.add_special_tokens(
        [token for token in special if token not in known and backend.token_to_id(token) is not None]
    )


def _added_token(fields: Mapping[str, Any]) -> tokenizers.AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(fields["content"], **{flag: fields[flag] for flag in flags if flag in fields})


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flatten(part)]


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _missing_message(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; give the folder of a model."
    others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).is_file()]
    if not others:
        return f"{folder} has no tokenizer.json; copy it from the model's repository."
    return f"{folder} has {others[0]} but no tokenizer.json; " + _CONVERT.format(folder=folder)


def _why_not_text(text: object) -> str:
    if not isinstance(text, str):
        return f"it is a {type(text).__name__}, not a string."
    where = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return f"character {where} is half a surrogate pair ({text[where]!r}); remove it."
