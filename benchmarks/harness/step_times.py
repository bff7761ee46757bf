"""What the benchmarks of strategies share: the question on the command line, and how a decode step is timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexmoe.bench.record import summary

Row = dict[str, Any]

REPEATS = 3


def numbers(text: str) -> list[int]:
    """1,8 as [1, 8]."""
    return [int(part) for part in text.split(",") if part]


def add_question(parser: argparse.ArgumentParser) -> None:
    """Options that say what is measured, on what, and where rows go."""
    parser.add_argument("model", nargs="?", help="a folder, a preset or a name on the Hub; none: the built-in model")
    parser.add_argument("--layers", type=int, help="of a preset: only so many")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)


def asked(args: argparse.Namespace) -> Row:
    """The part of it that a row repeats."""
    return {name: getattr(args, name) for name in ("prompt_len", "output_len", "dtype", "seed")}


def step_times(seconds_for: Callable[[int], float], batch: int, count: int) -> Row:
    """A step, (time for N + 1 tokens - time for 1) / N, and the first tokens of all prompts, after a warm-up.

    seconds_for: generates exactly so many tokens after each of `batch` prompts. count: N.
    """
    seconds_for(count + 1)
    steps, firsts = [], []
    for _ in range(REPEATS):
        first = seconds_for(1)
        steps.append((seconds_for(count + 1) - first) / count)
        firsts.append(first)
    step = summary([1e3 * each for each in steps])
    return {
        "step_ms": step,
        "tokens_per_s": round(1e3 * batch / step["median"], 1),
        "first_token_ms": summary([1e3 * each for each in firsts]),
        "samples": REPEATS,
    }
