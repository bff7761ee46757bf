"""FlexFlow's rules of length. Enters: what a request asks for and its prompt's tokens. Leaves: new tokens at most.

max_length counts prompt and output together, max_new_tokens the output alone. Neither given: all of max_seq_length
but one token. Both given: max_new_tokens counts, with a warning. Either at or above max_seq_length: ValueError.
Unlike FlexFlow's, a prompt that leaves no room for a new token is an error, not a request that silently vanishes, and
max_new_tokens is not one short where the tokenizer puts a begin-of-sequence token in front.
"""

from __future__ import annotations

import warnings

from flexmoe.errors import RequestError
from flexmoe.serve.errors import WrongPromptError

UNSET = -1


def choose(max_length: int, max_new_tokens: int, max_seq_length: int) -> tuple[int, int]:
    """(max_length, max_new_tokens) with exactly one of them set. Raises RequestError, a ValueError."""
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        _check(name, value, max_seq_length)
    if max_new_tokens == UNSET:
        return (max_seq_length - 1 if max_length == UNSET else max_length), UNSET
    if max_length != UNSET:
        warnings.warn(
            f"max_length={max_length} and max_new_tokens={max_new_tokens} are both given; max_new_tokens counts.",
            stacklevel=2,
        )
    return UNSET, max_new_tokens


def new_tokens(max_length: int, max_new_tokens: int, prompt_tokens: int, max_seq_length: int) -> int:
    """New tokens that a prompt of so many tokens may get, at least 1; the two lengths are those of `choose`."""
    if max_length == UNSET:
        room, limit, name = max_seq_length - prompt_tokens, max_seq_length, "max_seq_length"
    else:
        room, limit, name = max_length - prompt_tokens, max_length, "max_length"
    if room < 1:
        larger = "compile with a larger one if the model's context allows"
        remedy = larger if name == "max_seq_length" else "raise it"
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens, and {name}={limit} counts prompt and output together; "
            f"{remedy}, or shorten the prompt to at most {limit - 1} tokens."
        )
    return room if max_new_tokens == UNSET else min(room, max_new_tokens)


def _check(name: str, value: object, max_seq_length: int) -> None:
    if value is None or type(value) is not int:
        raise WrongPromptError(f"{name}={value!r} is not an integer; leave it out, or give tokens (-1: not given).")
    if value != UNSET and value < 1:
        raise RequestError(f"{name}={value} asks for no token; use at least 1, or -1 for no limit of its own.")
    if value >= max_seq_length:
        raise RequestError(
            f"{name}={value} is not below max_seq_length={max_seq_length}; use at most {max_seq_length - 1}, "
            f"or compile with max_seq_length={value + 1} or more if the model's context allows."
        )
