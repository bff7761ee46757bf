"""Tokenizer: what a folder may hold, special tokens, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.errors import CheckpointError, RequestError
from tests.tokenizer_folders import CONFIG, byte_level, sentencepiece, write


def test_encode_and_decode(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, sentencepiece()))
    ids = tokenizer.encode("Hello world 🐦")
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("Hello world 🐦", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "Hello world 🐦"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> Hello world 🐦"
    assert tokenizer.encode("a[INST]b", add_special_tokens=False).count(3) == 1
    assert tokenizer.token(ids[0]) == "<s>"
    assert tokenizer.token(10**6) is None
    assert tokenizer.decode([10**6, *ids]) == "Hello world 🐦"


def test_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, byte_level(), bos_token=None))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 2)
    end = tokenizer.vocab_size - 1
    assert tokenizer.token(end) == "<|im_end|>"
    assert tokenizer.special_ids == {0, 1, 2, 3, 4, end}
    assert tokenizer.special_tokens == {"eos_token": "</s>", "unk_token": "<unk>"}


def test_tokens_that_only_the_config_declares(tmp_path: Path) -> None:
    bare = json.loads(sentencepiece().to_str())
    bare["added_tokens"] = []
    folder = write(tmp_path, sentencepiece(), pad_token="[PAD]", extra_special_tokens=["[INST]"])
    (folder / "tokenizer.json").write_text(json.dumps(bare), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = len(bare["model"]["vocab"])
    config["added_tokens_decoder"] = {str(size): {"content": "<think>", "special": False, "normalized": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("[INST]<think>", add_special_tokens=False) == [3, size]
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.vocab_size == size + 1  # [PAD] is not in the vocabulary, so the model has no embedding for it


def test_old_special_tokens_map(tmp_path: Path) -> None:
    folder = write(tmp_path, sentencepiece())
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).eos_token_id is None
    named = {name: {"content": token, "lstrip": False} for name, token in CONFIG.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(named), encoding="utf-8")
    assert Tokenizer.from_folder(folder).eos_token_id == 2


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.from_folder(write(tmp_path, backend))
    assert len(tokenizer.encode("Hello world " * 9)) > 4
    assert len(tokenizer.encode("Hello")) < 64


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json; copy it"),
        ({"tokenizer.model": "x"}, r"has tokenizer.model but no tokenizer.json; convert it once: pip install"),
        ({"vocab.json": "{}", "merges.txt": ""}, "has vocab.json but no tokenizer.json"),
        ({"tokenizer.json": "{"}, "is not a tokenizer file"),
    ],
)
def test_folders_without_a_usable_tokenizer(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_damaged_config_and_missing_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    (folder / "tokenizer_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds a list, not an object"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{,", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Tokenizer.from_folder(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Tokenizer.from_folder(folder / "nowhere")


@pytest.mark.parametrize(("text", "message"), [("a\ud800", "character 1 is half a surrogate"), (7, "it is a int")])
def test_text_that_is_none(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Tokenizer(byte_level()).encode(text)


def test_importing_stays_light() -> None:
    program = (
        "import sys, flexmoe.engine.detokenizer, flexmoe.engine.chat_template, flexmoe.engine.sampling_state\n"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
