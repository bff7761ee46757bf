"""Grammars: which tokens keep an answer within a JSON schema. Enters: a schema, then each token. Leaves: a bit mask.

The work is llguidance's, an optional package. A schema is compiled once; every sample gets a copy of what came out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.errors import EngineError, MissingDependencyError, RequestError

Bits = npt.NDArray[np.int32]

_KEPT = 64  # compiled schemas
# Between the signs of JSON: enough to print prettily. With any amount, small models write white space until the end.
_LAYOUT = {"whitespace_pattern": r"(\n[ ]{0,20}|[ ])?"}


class Matcher(Protocol):
    """Follows one sample through its grammar."""

    def mask(self) -> Bits:
        """A bit for each token, the lowest first, set where the token may come next: [ceil(V / 32)]."""
        ...

    def accept(self, token_id: int) -> None:
        """The sample got this token. Raises EngineError if the grammar does not allow it."""
        ...


class FixedMask:
    """A matcher at rest: the mask of one step, for a process that computes just that."""

    def __init__(self, bits: Bits) -> None:
        self._bits = bits

    def mask(self) -> Bits:
        return self._bits

    def accept(self, token_id: int) -> None:
        raise EngineError("a mask that was sent elsewhere follows no tokens.")


class Grammars:
    """Makes matchers for one model. `check` may be called by any thread, also while another one decodes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, eos_token_ids
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def check(self, schema: Mapping[str, Any]) -> None:
        """Compile a schema ahead of its use. Raises RequestError if it is none, or says what is not supported."""
        self._compiled(schema_text(schema))

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """A matcher at the start of an answer."""
        return _Matcher(self._compiled(schema_text(schema)).deep_copy(), self._vocab_size)

    @functools.cached_property
    def _vocabulary(self) -> Any:
        llguidance = _library()
        if not self._eos:
            raise RequestError("this model has no end-of-sequence token, so no answer could end; leave out the schema.")
        tokenizer = self._tokenizer.backend.to_str()
        return llguidance.LLTokenizer(tokenizer, n_vocab=self._vocab_size, eos_token=list(self._eos))

    def _compile(self, schema: str) -> Any:
        llguidance = _library()
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, None, _LAYOUT)
            matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        except ValueError as error:
            raise RequestError(f"the JSON schema is refused: {_line(error)}") from error
        if matcher.is_error():
            raise RequestError(f"the JSON schema is refused: {_line(matcher.get_error())}")
        return matcher


class _Matcher:
    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._size = matcher, -(-vocab_size // 32)

    def mask(self) -> Bits:
        bits = np.zeros(self._size, np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return bits

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise EngineError(f"the grammar cannot go on after token {token_id}: {_line(self._matcher.get_error())}")


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependencyError("llguidance", "grammar", "a JSON schema for answers") from error
    return llguidance


def schema_text(schema: Mapping[str, Any]) -> str:
    """As JSON. Raises RequestError if it is not."""
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema is not JSON: {error}.") from error


def _line(error: object) -> str:
    """The first line of what the library says."""
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]
