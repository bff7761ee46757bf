"""Reads the corpus and splits it into training and validation text.

In: a folder with fiction, prose, docs and qa `.jsonl.xz`. Out: a `Corpus` of documents by group and source, where
about 1% of each source is held out and no held-out sentence comes back through the question-answer pairs.
"""

import hashlib
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from training.capitals import Capital, find_capitals, is_capital_question, training_pairs
from training.chat import Message, render

TEXT_GROUPS = ("fiction", "prose", "docs")
GROUPS = (*TEXT_GROUPS, "qa", "capitals")  # what a training batch is mixed from
HELD_OUT_SHARE = 0.01
QA_PASSES = 3  # the pairs are grouped into conversations anew in each pass
_KEY_LENGTH = 60  # characters of an answer that say which text it came from
_SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer the question.", "You are FlexMoE, a small language model.")


@dataclass(frozen=True, slots=True)
class Pair:
    """One question with its answer; `source` begins with "qa-"."""

    source: str
    question: str
    answer: str


@dataclass(slots=True)
class Corpus:
    """Training text by group, validation text by source. Chat text has its special tokens spelt out."""

    train: dict[str, list[str]] = field(default_factory=dict)
    validation: dict[str, list[str]] = field(default_factory=dict)
    capitals: list[Capital] = field(default_factory=list)
    trained_pairs: list[Pair] = field(default_factory=list)


def load(folder: Path, seed: int = 0) -> Corpus:
    """The whole corpus, split; the same folder and seed give the same result."""
    rng = random.Random(seed)
    corpus = Corpus()
    for group in TEXT_GROUPS:
        corpus.train[group] = []
        for source, documents in _by_source(folder / f"{group}.jsonl.xz").items():
            kept, held = split(documents)
            corpus.train[group] += kept
            corpus.validation[source] = held
        rng.shuffle(corpus.train[group])
    _add_questions(corpus, list(_read_pairs(folder / "qa.jsonl.xz")), rng)
    return corpus


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, validation): held out are the 1% (at least one) whose digests sort first."""
    ordered = sorted(documents, key=_digest)
    held = max(1, round(HELD_OUT_SHARE * len(ordered)))
    return ordered[held:], ordered[:held]


def _add_questions(corpus: Corpus, pairs: list[Pair], rng: random.Random) -> None:
    asked: list[Pair] = []
    others: list[Pair] = []
    for pair in pairs:
        capital = pair.source == "qa-factbook" and is_capital_question(pair.question)
        (asked if capital else others).append(pair)
    corpus.capitals = find_capitals((pair.question, pair.answer) for pair in asked)
    kept, held = _split_pairs(others, [text for texts in corpus.validation.values() for text in texts])
    for pair in held:
        corpus.validation.setdefault(pair.source, []).append(render(_turns([pair])))
    corpus.trained_pairs = kept
    corpus.train["qa"] = [text for _ in range(QA_PASSES) for text in conversations(kept, rng)]
    chats = [Pair("qa-capitals", question, answer) for question, answer in training_pairs(corpus.capitals, rng)]
    corpus.train["capitals"] = [text for _ in range(QA_PASSES) for text in conversations(chats, rng)]


def _split_pairs(pairs: list[Pair], held_texts: list[str]) -> tuple[list[Pair], list[Pair]]:
    """Held out: answers quoted from held-out documents, and 1% of the rest with all wordings of their question."""
    held_text = "\n".join(held_texts)
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.answer[:_KEY_LENGTH]].append(pair)
    kept: list[Pair] = []
    held: list[Pair] = []
    for key, group in groups.items():
        quoted = len(key) == _KEY_LENGTH and key in held_text
        chosen = int(_digest(key)[:8], 16) < HELD_OUT_SHARE * 2**32
        (held if quoted or chosen else kept).extend(group)
    return kept, held


def conversations(pairs: Iterable[Pair], rng: random.Random) -> Iterator[str]:
    """Chats of one to three turns in random order, a tenth of them with a system message."""
    waiting = list(pairs)
    rng.shuffle(waiting)
    while waiting:
        count = rng.choices((1, 2, 3), (0.75, 0.15, 0.10))[0]
        turns = _turns(waiting[-count:])
        del waiting[-count:]
        if rng.random() < 0.1:
            turns.insert(0, {"role": "system", "content": rng.choice(_SYSTEM_MESSAGES)})
        yield render(turns)


def _turns(pairs: list[Pair]) -> list[Message]:
    roles = (("user", "question"), ("assistant", "answer"))
    return [{"role": role, "content": getattr(pair, name)} for pair in pairs for role, name in roles]


def _by_source(path: Path) -> dict[str, list[str]]:
    documents: dict[str, list[str]] = defaultdict(list)
    for row in _rows(path):
        documents[str(row["source"])].append(str(row["text"]))
    return documents


def _read_pairs(path: Path) -> Iterator[Pair]:
    for row in _rows(path):
        question, answer = (message["content"].strip() for message in row["messages"])
        yield Pair(f"qa-{row['source']}", question, answer)


def _rows(path: Path) -> Iterator[dict]:  # type: ignore[type-arg]
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
