"""Which prompts to verify with. Enters: a model's tokenizer and context. Leaves: token ids of several lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.config.model import ModelConfig
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.errors import RequestError

# Lengths that differ, and one prompt longer than several cache blocks.
_TEXTS = (
    "Once upon a time",
    "The three primary colours are red,",
    "In a village at the foot of the mountains there lived a clockmaker. Every morning she opened the shutters, "
    "swept the step, and wound all the clocks in the window. One day",
    "Question: A farmer has 17 sheep, and all but 9 run away. How many are left, and how do you know? Explain each "
    "step, then give the answer on a line of its own. Remember that a good explanation names what is known, what is "
    "asked, and which rule leads from one to the other; it does not skip a step because it looks easy.\nAnswer:",
)
_LENGTHS = (5, 17, 40, 97)  # of random prompts, for a model without a tokenizer
_SEED = 20


@dataclass(frozen=True, slots=True)
class Prompts:
    """texts: empty for random token ids. max_tokens: how many new ones fit behind each of them."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    max_tokens: int

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in self.token_ids)


def choose_prompts(config: ModelConfig, tokenizer: Tokenizer | None, texts: Sequence[str], max_tokens: int) -> Prompts:
    """The given texts, else a default set that leaves half of the context for new tokens.

    Raises RequestError for texts without a tokenizer, and for a text that is empty or fills the context.
    """
    if texts:
        return _given(config, tokenizer, tuple(texts), max_tokens)
    longest = max(1, config.max_position // 2)
    if tokenizer is None:
        draw = random.Random(_SEED)
        lengths = [max(1, min(length, longest * length // _LENGTHS[-1])) for length in _LENGTHS]
        ids = [tuple(draw.randrange(config.vocab_size) for _ in range(length)) for length in lengths]
    else:
        ids = [tuple(tokenizer.encode(text)[:longest]) for text in _TEXTS]
    return _fit(config, _TEXTS if tokenizer is not None else (), tuple(ids), max_tokens)


def _given(config: ModelConfig, tokenizer: Tokenizer | None, texts: tuple[str, ...], max_tokens: int) -> Prompts:
    if tokenizer is None:
        raise RequestError("this model has no tokenizer, so it cannot read a prompt; leave it out for random tokens.")
    ids = tuple(tuple(tokenizer.encode(text)) for text in texts)
    for text, tokens in zip(texts, ids, strict=True):
        if not tokens:
            raise RequestError(f"the prompt {text!r} has no tokens; give at least one character.")
        if len(tokens) >= config.max_position:
            raise RequestError(
                f"a prompt has {len(tokens)} tokens, and the context of {config.max_position} must also hold new ones; "
                f"shorten it to at most {config.max_position - 1}."
            )
    return _fit(config, texts, ids, max_tokens)


def _fit(config: ModelConfig, texts: tuple[str, ...], ids: tuple[tuple[int, ...], ...], max_tokens: int) -> Prompts:
    room = config.max_position - max(len(tokens) for tokens in ids)
    return Prompts(texts, ids, min(max_tokens, room))
