"""What engines are asked. Enters: sizes and a seed. Leaves: prompts of token ids, the same for every engine."""

from __future__ import annotations

import random


def make_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` prompts of exactly `length` random token ids. Those of a smaller count are the first of a larger one."""
    return [[draw.randrange(vocab_size) for _ in range(length)] for draw in _draws(count, length, seed)]


def _draws(count: int, length: int, seed: int) -> list[random.Random]:
    return [random.Random(f"{seed} {length} {number}") for number in range(count)]
