"""Trains the byte-level BPE and writes it with its configuration.

In: the corpus folder. Out: tokenizer.json and tokenizer_config.json in the output folder.
Run: python -m training.train_tokenizer --corpus CORPUS --output src/flexmoe/assets/builtin
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training import corpus
from training.chat import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS

VOCAB_SIZE = 8192
CONTEXT = 1024
# Words with one leading blank, digits one by one (so that numbers are read as numbers), runs of marks, white space.
_PIECES = r" ?\p{L}+|\p{N}|'(?:s|t|re|ve|m|ll|d)\b| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train(texts: Iterator[str]) -> Tokenizer:
    """A tokenizer of `VOCAB_SIZE` entries that puts `<s>` in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def configuration() -> dict[str, object]:
    """What `transformers.AutoTokenizer` reads beside tokenizer.json; the chat template travels here."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the .jsonl.xz files")
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer.json")
    args = parser.parse_args()
    texts = corpus.load(args.corpus).train
    # One pass over the questions is enough to learn their words.
    questions = texts["qa"][: len(texts["qa"]) // corpus.QA_PASSES]
    groups = [*(texts[group] for group in corpus.TEXT_GROUPS), questions]
    tokenizer = train(text for group in groups for text in group)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.output / "tokenizer.json"))
    config = json.dumps(configuration(), indent=2, ensure_ascii=False)
    (args.output / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
