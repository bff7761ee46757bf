"""Writes the model card from the evaluation report, so that every figure in it was measured.

In: eval.json. Out: README.md in the checkpoint folder.
Run: python -m training.card --report training/results/eval.json --model src/flexmoe/assets/builtin
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training.sources import SOURCES

NAME = "flexmoe-tales-18m"

_HEAD = """\
---
license: cc-by-sa-4.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [mixtral, mixture-of-experts]
---

# {name}

A small Mixture-of-Experts language model with the Mixtral architecture, trained from scratch for FlexMoE and shipped
with it, so that the engine can be tried, tested and measured without a download. It tells old-fashioned tales, knows
the capitals of the world and recites some of what it read. It is a test subject, not a source of facts.

| | |
|---|---|
| parameters | 18.4 million, 11.3 million active for a token; bf16, {size:.1f} MiB |
| shape | 6 layers, hidden 512, 8 query and 4 key-value heads of 64, 8 experts of width 128, 2 chosen for a token |
| vocabulary, context | 8,192 (byte-level BPE, digits split singly), 1,024 tokens; input and output embeddings tied |
| licence | CC BY-SA 4.0, because it recites Wikipedia; FlexMoE's code has its own licence |

## Use

```python
from flexmoe import LLM, SamplingParams

print(LLM().generate("Once upon a time", SamplingParams(max_tokens=64))[0].text)
```

It also loads in `transformers.MixtralForCausalLM`. Chats follow the template in `tokenizer_config.json`, exactly the
one it was trained with: `<s>[INST]question[/INST]answer</s>[INST]...`; a system message goes in front of the first
question, followed by an empty line.

## Training

Two phases on one H100, together about six minutes: 2,600 steps of 131,072 tokens over the whole corpus (dropout 0.1),
then {finish} over a mix that is half questions and answers (no dropout). The second phase learns them by heart:
recall of trained questions rises from almost nothing to the figures below, and held-out loss gets worse (books from
3.36 to 3.46, questions from 2.34 to 3.33, in the logs' packed windows, where the words of the question count too; the
table below asks for answers alone). Both were measured, and blends of the two; this one ships because a question that
it was trained on should get its answer. AdamW, bf16 with fp32 masters, linear decay. The scripts, logs and loss curve
are in the repository's `training/` folder.
"""

_LIMITS = """\
## Limits

- It recites. Asked what it never read, or a fact in other words than it was trained on, it makes up facts, names,
  figures and now and then words, or misspells the name in the question; never rely on an answer.
- Its sentences are mostly grammatical, but its stories go nowhere: persons and places change midway.
- It knows only English, mostly of the nineteenth century and of software manuals, and carries their views of the world.
- Greedy decoding of stories and of code falls into loops; sampling at temperature 0.7 helps.
- No safety training of any kind; 1,024 tokens of context.

## Attribution

Wikipedia text: Wikipedia contributors, [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/), introductions
of the vital articles. WordNet 3.0: Princeton University. Documentation: the authors of each project named above, under
the licences named there. Books: Standard Ebooks' volunteers and the transcribers they built on.
"""


def write(report: dict[str, Any], finish: str, folder: Path) -> None:
    """Writes the card into the checkpoint folder."""
    size = (folder / "model.safetensors").stat().st_size / 2**20
    head = _HEAD.format(name=NAME, size=size, finish=finish)
    parts = [head, _losses(report), _capitals(report), _load(report), _samples(report), _LIMITS]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _losses(report: dict[str, Any]) -> str:
    rows = []
    for name, source in SOURCES.items():
        row = report["losses"][name]
        rows.append(
            (source.title, source.licence, f"{row['loss']:.2f}", f"{row['perplexity']:.1f}", f"{row['tokens']:,}")
        )
    head = ("source", "licence", "loss", "perplexity", "tokens")
    return (
        "## Sources, and loss on held-out text\n\n"
        "Nats a token on about 1% of each source, held out before training; for questions, over the answers only.\n"
        "Questions whose answer quotes a held-out document were held out with it. A question that was held out is one\n"
        "whose answer it never read: a high loss there is the price of learning the others by heart. Few tokens, as\n"
        "for small talk, make a rough figure.\n\n" + _table(head, rows)
    )


def _capitals(report: dict[str, Any]) -> str:
    capitals = report["capitals"]
    rows = [
        (name, f"`{capitals[key]['form']}`", f"{capitals[key]['share']:.1%}", _misses(capitals[key]["misses"]))
        for key, name in (("plain", "trained"), ("held_out_form", "never trained"))
    ]
    recall = [
        (SOURCES[name].title, str(row["questions"]), f"{row['exact']:.0%}", f"{row['word_f1']:.2f}")
        for name, row in report["trained_questions"].items()
    ]
    return (
        f"## What it answers\n\nThe capitals of {capitals['countries']} countries and territories, greedy; an answer "
        "counts only if the whole sentence is right.\nEvery city is in the training data, so this measures recall:\n\n"
        + _table(("form of the question", "", "right", "misses"), rows)
        + "\nQuestions that were in the training data, asked again (greedy; F1 counts words in common):\n\n"
        + _table(("source", "asked", "word for word", "F1"), recall)
    )


def _load(report: dict[str, Any]) -> str:
    load = report["expert_load"]
    rows = [(str(index), *(f"{share:.1%}" for share in layer)) for index, layer in enumerate(load["layers"])]
    return (
        "## Load of the experts\n\nShare of each layer's routing choices over all held-out text (uniform: 12.5%); "
        f"the least used expert gets {load['min']:.1%}.\n\n"
        + _table(("layer", *(f"expert {index}" for index in range(len(load["layers"][0])))), rows)
    )


def _samples(report: dict[str, Any]) -> str:
    answers = [f"> **{question}** {_one_line(answer)}\n" for question, answer in report["answers"].items()]
    stories = [f"> **{prompt}** {_one_line(text)} ...\n" for prompt, text in report["stories"].items()]
    sampled = "Continuations, temperature 0.7, top-p 0.9, seed 0:\n"
    return "\n".join(["## Samples\n", "Answers, greedy:\n", *answers, sampled, *stories])


def _misses(misses: dict[str, str]) -> str:
    return ", ".join(misses) or "none"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, required=True, help="eval.json")
    parser.add_argument("--finish", default="1,400 steps", help="length of the finishing phase, in words")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    args = parser.parse_args()
    write(json.loads(args.report.read_text()), args.finish, args.model)


if __name__ == "__main__":
    main()
