"""Small tokenizers of each kind in use, trained on a few sentences: what tests need of a model folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "Hello world, this is a test of the tokenizer; stop here.",
    "Once upon a time there was a little bird flying high over the hills.",
    "The user said STOP and the assistant stopped.",
] * 10
FOREIGN = ["你好世界 日本語 한국어 naïve café 🐦🍕"] * 10
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

BOS_FIRST = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
)


def byte_level() -> Tokenizer:
    """GPT-2's kind, as in Qwen, OLMoE and Llama 3; with two added tokens, one of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS + FOREIGN, trainer)
    tokenizer.add_tokens(["<tool> 你好"])
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer


def sentencepiece(post_processor: bool = True) -> Tokenizer:
    """Llama's and Mixtral's kind: marks for spaces, byte tokens for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    fields = json.loads(tokenizer.to_str())  # the trainer took the byte tokens for special ones
    fields["added_tokens"] = [token for token in fields["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    if post_processor:
        tokenizer.post_processor = BOS_FIRST
    return tokenizer


def gemma() -> Tokenizer:
    """SentencePiece without a space put in front."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece unigrams, as in T5."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS + FOREIGN, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """A decoder without a stream of its own."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": functools.cache(byte_level),
    "sentencepiece": functools.cache(sentencepiece),
    "gemma": functools.cache(gemma),
    "metaspace": functools.cache(metaspace),
    "word_piece": functools.cache(word_piece),
}


def write(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **CONFIG, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder
