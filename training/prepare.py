"""Turns the corpus into arrays of token ids.

In: the corpus folder and tokenizer.json. Out: in the data folder one `train-GROUP.npy` for each group, one
`validation-SOURCE.npy` for each source (uint16; every document is `<s> ... </s>`), `meta.json` with their
sizes, and for the evaluation `capitals.json` and `trained_pairs.json`.
Run: python -m training.prepare --corpus CORPUS --tokenizer TOKENIZER.json --output DATA
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training import corpus
from training.chat import BOS, EOS

RECALL_SAMPLE = 50  # trained pairs of each source that the evaluation asks again
Ids = NDArray[np.uint16]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    """Ids of plain documents: text that looks like a special token stays text."""
    tokenizer.encode_special_tokens = True
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    tokenizer.encode_special_tokens = False
    return np.concatenate([np.array([bos, *each.ids, eos], np.uint16) for each in encoded])


def encode_chats(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    """Ids of rendered conversations, whose special tokens are spelt out already."""
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([np.array(each.ids, np.uint16) for each in encoded])


def prepare(folder: Path, tokenizer_file: Path, output: Path) -> dict[str, dict[str, int]]:
    """Writes all arrays; returns tokens and UTF-8 bytes of each."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    data = corpus.load(folder)
    parts = {f"train-{group}": texts for group, texts in data.train.items()}
    parts |= {f"validation-{source}": texts for source, texts in data.validation.items()}
    output.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, texts in parts.items():
        chat = name in ("train-qa", "train-capitals") or name.startswith("validation-qa-")
        ids = (encode_chats if chat else encode_texts)(tokenizer, texts)
        np.save(output / f"{name}.npy", ids)
        sizes[name] = {"documents": len(texts), "tokens": len(ids), "bytes": sum(len(text.encode()) for text in texts)}
    _write_json(output / "meta.json", sizes)
    _write_json(output / "capitals.json", [asdict(capital) for capital in data.capitals])
    _write_json(output / "trained_pairs.json", [asdict(pair) for pair in _sample(data.trained_pairs)])
    return sizes


def _sample(pairs: list[corpus.Pair]) -> list[corpus.Pair]:
    """Some pairs of each source that training saw, to ask for again."""
    rng = random.Random(1)
    by_source: dict[str, list[corpus.Pair]] = defaultdict(list)
    for pair in pairs:
        by_source[pair.source].append(pair)
    return [pair for group in by_source.values() for pair in rng.sample(group, min(len(group), RECALL_SAMPLE))]


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the .jsonl.xz files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="folder for the arrays")
    args = parser.parse_args()
    for name, size in prepare(args.corpus, args.tokenizer, args.output).items():
        print(f"{name:32} {size['documents']:7,} documents {size['tokens']:11,} tokens")


if __name__ == "__main__":
    main()
