"""SamplingParams: how one request wants its tokens chosen. Enters: user values. Leaves: checked, frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from flexmoe.errors import RequestError, UnknownOptionError

_MAX_LOGPROBS = 20


def _as_tuple(value: object, item: type, name: str) -> tuple[Any, ...]:
    items = () if value is None else (value,) if isinstance(value, item) else value
    if not isinstance(items, (list, tuple)) or not all(type(i) is item for i in items):
        raise RequestError(f"{name}={value!r} is not a {item.__name__} or a list of {item.__name__}.")
    return tuple(items)


def _as_bias(value: object) -> dict[int, float]:
    """Token ids may come as strings, as JSON has no other keys."""
    items = {} if value is None else value
    refusal = RequestError(f"logit_bias={value!r} is not a mapping from token id to a number.")
    if not isinstance(items, Mapping) or any(isinstance(token, float) for token in items):
        raise refusal
    try:
        return {int(token): float(bias) for token, bias in items.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise refusal from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    temperature: 0 is greedy (the most likely token; ties go to the lower id). Default 1.0.
    top_k: keep the k most likely tokens; 0 or -1 keeps all. top_p: keep the smallest set whose probability
    reaches p. min_p: drop tokens less likely than min_p times the most likely one.
    repetition_penalty: divides positive and multiplies negative logits of tokens already seen in prompt or output.
    presence_penalty, frequency_penalty: subtracted once, or once per occurrence, for tokens in the output.
    seed: makes this request's samples reproducible whatever else runs beside it.
    n: samples per prompt. max_tokens: None means up to the model's context. min_tokens: no stop before that many.
    stop: strings that end the text (left out unless include_stop_str_in_output). stop_token_ids: the same by id.
    Of both, one or a list; None is an empty list.
    ignore_eos: go on after the end-of-sequence token. logprobs: log-probabilities of that many best tokens a step.
    logit_bias: added to the logits of the given token ids. json_schema: the text will be JSON of this schema; {} is any
    JSON. Needs the package llguidance. routing: of how many first tokens the output tells the experts; slows the steps
    that compute them, see docs/routing.md.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 128
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    json_schema: Mapping[str, Any] | None = None
    routing: int = 0

    def __new__(cls, **options: Any) -> SamplingParams:
        """Refuses unknown names with the nearest known one; __init__ would only say that it is unexpected."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise UnknownOptionError(name, known, "SamplingParams")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name, item in (("stop", str), ("stop_token_ids", int)):
            object.__setattr__(self, name, _as_tuple(getattr(self, name), item, name))
        object.__setattr__(self, "logit_bias", _as_bias(self.logit_bias))
        self._check_numbers()
        self._check_integers_and_flags()
        self._check_together()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping."""
        return cls(**options)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def plain_greedy(self) -> bool:
        """Greedy with nothing that changes or reads the logits: the sampler needs one argmax only."""
        return self.greedy and self.logprobs is None and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        return penalties or bool(self.logit_bias) or self.min_tokens > 0 or self.json_schema is not None

    def _check_numbers(self) -> None:
        ranges = {
            "temperature": (0.0, 100.0),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.0, 100.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
        }
        for name, (low, high) in ranges.items():
            _check_number(name, getattr(self, name), low, high)
        if self.top_p == 0.0:
            raise RequestError("top_p=0 keeps no token; use a value above 0 and up to 1.")
        if self.repetition_penalty == 0.0:
            raise RequestError("repetition_penalty=0 divides by zero; use a value above 0 (1 is off).")
        for token, bias in self.logit_bias.items():
            _check_number(f"logit_bias[{token}]", bias, -1e9, 1e9)

    def _check_integers_and_flags(self) -> None:
        _check_integer("n", self.n, 1, 128)
        _check_integer("top_k", self.top_k, -1, None)
        _check_integer("min_tokens", self.min_tokens, 0, None)
        _check_integer("routing", self.routing, 0, None)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, None)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, _MAX_LOGPROBS)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r} is neither True nor False.")
        if "" in self.stop:
            raise RequestError("stop holds an empty string, which would stop at once; remove it.")

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; lower one or raise the other."
            )
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping):
            raise RequestError(f"json_schema={self.json_schema!r} is not a mapping.")
        if self.json_schema is not None and (self.min_tokens or self.ignore_eos):
            raise RequestError("json_schema ends an answer where its JSON ends; leave out min_tokens and ignore_eos.")
        if self.greedy and self.n > 1:
            raise RequestError(
                f"n={self.n} with temperature=0 would give {self.n} identical samples; "
                "use n=1 or a temperature above 0."
            )


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name}={value!r} is not a number from {low:g} to {high:g}.")


def _check_integer(name: str, value: object, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name}={value!r} is not an integer {span}.")
