"""What sampling remembers of one request. Enters: its parameters, then each accepted token. Leaves: numbers, no tensor.

A draw depends on the seed and on how many tokens came before it, on nothing else: not on the requests that share the
batch, nor on the row, nor on whether the request was preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.grammar import Bits, FixedMask, Matcher
from flexmoe.errors import RequestError

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class SamplingState:
    """Sampling state of one sample of one request; call `accept` once for each token it is given."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt_token_ids: Sequence[int] = (),
        *,
        eos_token_ids: Iterable[int] = (),
        vocab_size: int | None = None,
        grammar: Matcher | None = None,
    ) -> None:
        """seed: of this sample; give each of `n` samples its own. eos_token_ids: the model's, for min_tokens.
        grammar: at its start.

        Raises RequestError if logit_bias or stop_token_ids name a token that is not below vocab_size.
        """
        self.params = params
        self.num_tokens = 0
        self._grammar = grammar
        self.start = _mix(seed & _WORD)
        eos = () if params.ignore_eos else eos_token_ids
        self._stop_ids = tuple(sorted({*eos, *params.stop_token_ids}))
        self._penalised = _has_penalty(params)
        # Of device_ready, which each row is asked in each step: what does not change, and until when the rest does.
        asks = self._penalised or params.logit_bias or params.logprobs is not None
        self._plain = grammar is None and not asks
        self._suppressed_until = params.min_tokens if self._stop_ids else 0
        self._seen = TokenCounts(prompt_token_ids if self._penalised else ())
        if vocab_size is not None:
            _check_ids("logit_bias", params.logit_bias, vocab_size)
            _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)

    def accept(self, token_id: int) -> None:
        """The request got this token. Raises EngineError if its grammar does not allow it."""
        self.num_tokens += 1
        if self._grammar is not None:
            self._grammar.accept(token_id)
        if self._penalised:
            self._seen.add(token_id)

    @property
    def plain_greedy(self) -> bool:
        """Whether the next token is the argmax of the raw logits, with nothing else asked for."""
        return self.params.greedy and self.device_ready

    @property
    def device_ready(self) -> bool:
        """Whether the next token and all after it are chosen without knowing those in between: from raw logits and a
        random number, nothing else. Once true it stays true.
        """
        return self._plain and self.num_tokens >= self._suppressed_until

    @property
    def wants_routing(self) -> bool:
        """Whether the experts behind the next token are to be told. Once false it stays false."""
        return self.num_tokens < self.params.routing

    @property
    def allowed(self) -> Bits | None:
        """A bit for each token that the grammar lets come next, see grammar.Matcher; None if there is no grammar."""
        return None if self._grammar is None else self._grammar.mask()

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Token ids that may not come yet, because min_tokens is not reached."""
        return self._stop_ids if self.num_tokens < self.params.min_tokens else ()

    @property
    def seen(self) -> TokenCounts:
        """Tokens of prompt and output, with their counts in the output; empty unless a penalty needs them."""
        return self._seen

    def uniform(self, ahead: int = 0) -> float:
        """The random number in [0, 1) of the next token: the num_tokens-th of the SplitMix64 stream of the seed.

        ahead: tokens still to be accepted before that one.
        """
        return (_mix((self.start + (self.num_tokens + ahead + 1) * _GOLDEN) & _WORD) >> 11) * 2.0**-53

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs for the next token: of a grammar its mask."""
        bits = self.allowed
        return self.__dict__ if bits is None else self.__dict__ | {"_grammar": FixedMask(bits)}


def uniforms(states: Sequence[SamplingState], ahead: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """SamplingState.uniform of many at once. ahead: of each whether a token is still to be accepted before that one."""
    starts = np.array([state.start for state in states], np.uint64)
    numbers = np.array([state.num_tokens for state in states], np.uint64) + ahead.astype(np.uint64) + np.uint64(1)
    word = starts + numbers * np.uint64(_GOLDEN)  # uint64 wraps, as the generator wants it
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn: npt.NDArray[np.float64] = ((word ^ (word >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
    return drawn


class TokenCounts:
    """Distinct token ids in order of appearance and how often each was generated (0: in the prompt only)."""

    def __init__(self, prompt_token_ids: Sequence[int] = ()) -> None:
        ids = sorted({*prompt_token_ids})
        self._place = {token: place for place, token in enumerate(ids)}
        self._ids: npt.NDArray[np.int64] = np.array(ids, np.int64)
        self._counts: npt.NDArray[np.float32] = np.zeros(len(ids), np.float32)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: len(self)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self._counts[: len(self)]

    def add(self, token_id: int) -> None:
        """One more in the output; constant time on average, as the arrays double."""
        place = self._place.setdefault(token_id, len(self))
        if place == len(self._ids):
            spare = max(16, place)
            self._ids = np.concatenate([self._ids, np.zeros(spare, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(spare, np.float32)])
        self._ids[place] = token_id
        self._counts[place] += 1


def _mix(word: int) -> int:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input stirs every bit of the output."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _has_penalty(params: SamplingParams) -> bool:
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return penalties != (1.0, 0.0, 0.0)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"{name} names token {token_id}; this model has tokens 0 to {vocab_size - 1}.")
