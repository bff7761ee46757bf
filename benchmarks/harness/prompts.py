"""Prompts of an exact length. Enters: a model folder, a length, a seed. Leaves: token ids, alike for every engine."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

_SENTENCES = (
    "Once upon a time there was a small boat that was afraid of deep water.",
    "Every morning the baker opened the door and the whole street smelled of bread.",
    "The old clock in the hall had not worked for years, but nobody wanted to take it away.",
    "She found a key under the stone, and it fitted no door in the house.",
    "When the rain stopped, the children ran to the river to see how high it had risen.",
    "The teacher asked a question, and for a long time nobody dared to answer.",
    "In the middle of the forest stood a tree that was older than the village.",
    "He counted the coins again, put three of them aside, and gave the rest to his sister.",
    "A train passes here only once a week, so everybody comes out to watch it.",
    "The cat had been asleep on the map, and so the journey began a day late.",
    "They built a bridge of ropes first, and of wood the year after.",
    "On the last page of the book somebody had written a name in pencil.",
)


def make_prompts(model: Path, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` prompts of exactly `length` tokens: sentences in random order, or random ids without a tokenizer."""
    draw = random.Random(f"{seed} {length} {count}")
    return [_prompt(model, length, draw) for _ in range(count)]


def random_prompts(vocab: int, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` prompts of random ids, for a model of random weights, to which all are alike."""
    draw = random.Random(f"{seed} {length} {count}")
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]


def _prompt(model: Path, length: int, draw: random.Random) -> list[int]:
    if not (model / "tokenizer.json").is_file():
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        return [draw.randrange(vocab) for _ in range(length)]
    ids: list[int] = []
    while len(ids) < length:
        ids = _encode(model, " ".join(draw.choices(_SENTENCES, k=8 + length // 4)))
    return ids[:length]


def _encode(model: Path, text: str) -> list[int]:
    return list(_tokenizer(model).encode(text).ids)


@cache
def _tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))
