"""The same ids, text and prompts as transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flexmoe.engine.chat_template import ChatTemplate
from flexmoe.engine.tokenizer import Tokenizer
from tests.chat_templates import STYLES, TALKS, TOOL_TALK, TOOLS
from tests.tokenizer_folders import KINDS, sentencepiece, write

SENTENCES = ["", " ", "Hello world", "  two  spaces ", "a[INST]b [/INST] c", "🐦 你好 café\n\n\tx", "<s>x</s>"]


def both(folder: Path, model_type: str = "mixtral") -> tuple[Tokenizer, Any]:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "gemma", "metaspace"])
def test_ids_and_text(tmp_path: Path, kind: str) -> None:
    ours, theirs = both(write(tmp_path, KINDS[kind]()))
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids == set(theirs.all_special_ids) | {
        i for i, t in theirs.added_tokens_decoder.items() if t.special
    }
    assert ours.vocab_size == len(theirs)
    for text in SENTENCES:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_begin_of_sequence(tmp_path: Path, tokenizer_class: str, post_processor: bool, add_bos_token: bool) -> None:
    """Where tokenizer.json and tokenizer_config.json disagree, tokenizer.json wins, as in transformers 5."""
    options = {"tokenizer_class": tokenizer_class, "add_bos_token": add_bos_token, "legacy": True}
    ours, theirs = both(write(tmp_path, sentencepiece(post_processor), **options))
    for text in SENTENCES:
        assert ours.encode(text) == theirs(text).input_ids


def test_tokens_that_only_the_config_declares(tmp_path: Path) -> None:
    bare = json.loads(sentencepiece().to_str())
    bare["added_tokens"] = []
    size = len(bare["model"]["vocab"])
    declared = {str(size): {"content": "<think>", "special": False, "normalized": False, "lstrip": True}}
    folder = write(tmp_path, sentencepiece(), added_tokens_decoder=declared)
    (folder / "tokenizer.json").write_text(json.dumps(bare), encoding="utf-8")
    ours, theirs = both(folder)
    for text in [*SENTENCES, "a <think> b"]:
        assert ours.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("open_turn", [True, False])
def test_prompts(tmp_path: Path, style: str, talk: str, open_turn: bool) -> None:
    folder = write(tmp_path, KINDS["byte_level"](), chat_template=STYLES[style])
    ours, theirs = both(folder)
    template = ChatTemplate.from_folder(folder, ours.special_tokens)
    text = template.render(TALKS[talk], add_generation_prompt=open_turn)
    assert text == theirs.apply_chat_template(TALKS[talk], tokenize=False, add_generation_prompt=open_turn)
    ids = theirs.apply_chat_template(TALKS[talk], add_generation_prompt=open_turn, return_dict=False)
    assert ours.encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("variables", [{}, {"thinking": True}])
def test_prompts_with_tools(tmp_path: Path, variables: dict[str, Any]) -> None:
    named = [{"name": "default", "template": STYLES["chatml"]}, {"name": "tool_use", "template": STYLES["headers"]}]
    folder = write(tmp_path, KINDS["byte_level"](), chat_template=named)
    ours, theirs = both(folder)
    template = ChatTemplate.from_folder(folder, ours.special_tokens)
    text = template.render(TOOL_TALK, tools=TOOLS, **variables)
    options = {"tokenize": False, "add_generation_prompt": True, **variables}
    assert text == theirs.apply_chat_template(TOOL_TALK, tools=TOOLS, **options)
    assert "Wie ist's in <Köln>?" in text
