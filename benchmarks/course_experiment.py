"""The course project's experiment again: TinyMistral-6x248M's shape, its prompt, 128 tokens, 1 to 6 experts.

    python benchmarks/course_experiment.py [--experts 1,2,3,4,5,6] [--engine flexmoe,hf-default] [--out rows.jsonl]

Two experts a token (with one expert, that one), greedy, one sequence, weights random: what a token costs does not
depend on them. The preset has no tokenizer, so the prompt's ids are those of the built-in model's, all below any
vocabulary here. In FlexFlow Serve time grew with each expert present, since experts ran one after the other. That
project's figures stand in src/flexmoe/report/cited.jsonl; `flexmoe report` draws both. A row is one JSON line, with the
keys of `flexmoe bench latency`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexmoe.bench.latency import ENGINES, LatencyOptions, measure
from flexmoe.bench.record import append
from flexmoe.bench.subject import Changes
from flexmoe.config.engine import LoadConfig
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.models.hub import open_model

PROMPT = "Three tips for staying healthy are: "
MODEL = "tinymistral-6x248m"
TOKENS = 128


def prompt_ids() -> list[int]:
    """The prompt in the built-in model's tokens."""
    folder = open_model(LoadConfig()).folder
    assert folder is not None
    return Tokenizer.from_folder(folder).encode(PROMPT)


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each number of experts and engine, as it is measured."""
    ids = prompt_ids()
    for experts in arguments.experts:
        options = LatencyOptions(
            model=MODEL,
            changes=Changes(layers=arguments.layers, experts=experts, top_k=min(2, experts)),
            engines=arguments.engine,
            batches=(1,),
            prompt_len=len(ids),
            prompt=ids,
            output_len=arguments.tokens,
            device=arguments.device,
            threads=arguments.threads,
        )
        for row in measure(options, notify=_tell):
            yield row | {"params": row["params"] | {"prompt": PROMPT}}


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, _words(text)))


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a line for each row, and append the rows."""
    parser = argparse.ArgumentParser(description="The course project's experiment: latency against number of experts.")
    parser.add_argument("--experts", type=_numbers, default=(1, 2, 3, 4, 5, 6), help="how many, with commas between")
    parser.add_argument("--engine", type=_words, default=("flexmoe", "hf-default"), help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="steps that are timed")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="file to append the rows to")
    arguments = parser.parse_args(words)
    for row in rows(arguments):
        result = row["result"]
        told = result.get("error") or f"{result['ms']:7.2f} ms a token, {result['percent_of_floor']:3.0f}% of the floor"
        print(f"{row['model']['experts']} experts  {row['engine']:<11} {told}")
        if arguments.out is not None:
            append(arguments.out, row)


if __name__ == "__main__":
    main()
