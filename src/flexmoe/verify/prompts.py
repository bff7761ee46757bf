"""Which prompts to verify with. Enters: a model's tokenizer and context. Leaves: token ids of several lengths."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Prompts:
    """token_ids: of each text, perhaps shortened. max_tokens: how many new ones fit behind each of them."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    max_tokens: int

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in self.token_ids)


def choose_prompts(config: ModelConfig, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> Prompts:
    """The given texts, else a default set that leaves half of the context for new tokens.

    Raises RequestError for a text that is empty or fills the context.
    """
    if texts:
        ids = tuple(_checked(config, text, tokenizer.encode(text)) for text in texts)
    else:
        ids = tuple(tuple(tokenizer.encode(text)[: max(1, config.max_position // 2)]) for text in _TEXTS)
    room = config.max_position - max(len(tokens) for tokens in ids)
    return Prompts(tuple(texts) or _TEXTS, ids, min(max_tokens, room))


def _checked(config: ModelConfig, text: str, tokens: list[int]) -> tuple[int, ...]:
    if not tokens:
        raise RequestError(f"the prompt {text!r} has no tokens; give at least one character.")
    if len(tokens) >= config.max_position:
        raise RequestError(
            f"a prompt has {len(tokens)} tokens, and the context of {config.max_position} must also hold new ones; "
            f"shorten it to at most {config.max_position - 1}."
        )
    return tuple(tokens)
