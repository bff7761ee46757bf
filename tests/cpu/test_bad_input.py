"""Wrong input through both doors, `LLM()` and the command `flexmoe generate`: one clear error, nothing half-done."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmoe import (
    LLM,
    CheckpointError,
    ConfigError,
    FlexMoEError,
    MissingTensorError,
    RequestError,
    SamplingParams,
    TensorShapeError,
    UnknownOptionError,
    UnsupportedModelError,
)
from flexmoe.engine import startup
from tests.cpu.serving import GREEDY, assert_idle, open_llm
from tests.cpu.tiny_models import copy_of, edit_config, tiny

SMALL: dict[str, Any] = {"dtype": "float32", "threads": 1, "num_blocks": 8}
SHARD = "model-00002-of-00006.safetensors"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with open_llm() as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """After the test it must be empty, and answer as before."""
    before = shared.generate([[5, 6]], GREEDY)[0].token_ids
    yield shared
    assert_idle(shared)
    assert shared.generate([[5, 6]], GREEDY)[0].token_ids == before


# --------------------------------------------------------------------------------------------------------- checkpoints


def missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncated_shard(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def _edit(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def wrong_shape(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))


def missing_tensor(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))


def only_pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def malformed_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mixtral",')


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def impossible_config(folder: Path) -> None:
    edit_config(folder, num_attention_heads=0)


def unknown_architecture(folder: Path) -> None:
    edit_config(folder, architectures=["GPT2LMHeadModel"], model_type="gpt2")


def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


Damage = Callable[[Path], None]
DAMAGES: dict[Damage, tuple[type[FlexMoEError], str]] = {
    missing_shard: (CheckpointError, f"lacks 1 of 6 weight files: {SHARD}; download them again"),
    truncated_shard: (CheckpointError, f"{SHARD} is truncated: "),
    wrong_shape: (TensorShapeError, "model.norm.weight"),
    missing_tensor: (MissingTensorError, "model.layers.1.self_attn.q_proj.weight"),
    only_pickle: (CheckpointError, "pytorch_model.bin"),
    no_weights: (CheckpointError, "safetensors"),
    malformed_config: (ConfigError, "config.json is not JSON: "),
    no_config: (CheckpointError, "has no config.json"),
    impossible_config: (ConfigError, "num_attention_heads=0 is not a positive integer"),
    unknown_architecture: (
        UnsupportedModelError,
        "'GPT2LMHeadModel' is not supported; supported: Mixtral",
    ),
    damaged_tokenizer: (CheckpointError, "tokenizer.json is not a tokenizer file"),
    no_tokenizer: (CheckpointError, "has no tokenizer.json"),
}


def damaged(damage: Damage, folder: Path) -> Path:
    sharded = damage in (missing_shard, truncated_shard)
    copy = copy_of(tiny("mixtral", sharded=sharded), folder / "model")
    damage(copy)
    return copy


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_refused(damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a decoder is built, so that no memory is taken."""
    monkeypatch.setattr(startup, "_build", lambda *_: pytest.fail("a decoder was built"))
    kind, message = DAMAGES[damage]
    with pytest.raises(kind) as caught:
        LLM(damaged(damage, tmp_path), **SMALL)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_model_leaves_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may turn out to be damaged after its header was read, when the decoder is there to be filled."""
    built = []

    def fail(source: object, params: dict[str, torch.Tensor], *_: object, **__: object) -> None:
        built.append(weakref.ref(params["norm.weight"]))
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr(startup, "load_weights", fail)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        LLM(tiny("mixtral"), **SMALL)
    gc.collect()
    assert [reference() for reference in built] == [None]


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"max_num_seq": 4}, UnknownOptionError, "has no option 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ({"pipeline_parallel_size": 3}, ConfigError, "=3 is above the model's 2 layers; use at most 2"),
        ({"tensor_parallel_size": 3}, ConfigError, "tensor_parallel_size=3 does not fit 4 heads with 2 key heads"),
        ({"device": "tpu"}, ConfigError, "device='tpu' is not a device; use auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, ConfigError, "device='mps' is not supported; use auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, ConfigError, "device='cuda:99', but"),
        ({"dtype": "int8"}, ConfigError, "dtype='int8' is not one of auto, float32, bfloat16, float16"),
        ({"dtype": torch.float32}, ConfigError, "dtype=torch.float32 is not one of"),
        ({"max_model_len": 129}, ConfigError, "max_model_len=129 is above the model's context of 128 tokens; use at"),
        ({"kv_cache_memory": 1000, "num_blocks": None}, ConfigError, "holds no block; one takes 8192 bytes, a full"),
        ({"kv_cache_memory": 10**15, "num_blocks": None}, ConfigError, "the KV cache would take 931322.57 GiB, but"),
        ({"num_blocks": 10**12}, ConfigError, "of memory are free; lower kv_cache_memory"),
        ({"kv_cache_memory": 10**6}, ConfigError, "num_blocks=8 and kv_cache_memory=1000000 both set the size of"),
        ({"block_size": 10**9, "num_blocks": None}, ConfigError, "lower max_model_len, or block_size if it is larger"),
        ({"threads": 10**6}, ConfigError, "threads=1000000 is above the"),
        ({"model": "mixtral-8x7b"}, CheckpointError, "is a preset: a configuration without weights"),
        ({"model": ""}, CheckpointError, "model is an empty name"),
    ],
    ids=str,
)
def test_options_that_cannot_be_served(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        LLM(**{"model": tiny("mixtral"), **SMALL, **options})
    assert words in str(caught.value)


def test_a_model_too_large_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"load_format": "dummy", "dtype": "float32", "threads": 1}
    monkeypatch.setattr(startup, "_available_memory", lambda: 10 * 2**30)
    with pytest.raises(ConfigError) as caught:
        LLM("mixtral-8x7b", **options)
    words = "the weights take 173.98 GiB in float32, but only 10.00 GiB of memory are free on device 'cpu'"
    assert str(caught.value) == words + "; use a smaller model or a 16-bit dtype."
    monkeypatch.setattr(startup, "_available_memory", lambda: 29 * 2**30)
    with pytest.raises(ConfigError, match=r"max_model_len=4096 tokens needs 1.00 GiB of KV cache, but only 0.\d\d GiB"):
        LLM("olmoe-1b-7b", **options)


def test_a_refusal_leaves_torch_s_threads_alone() -> None:
    before = torch.get_num_threads()
    with pytest.raises(CheckpointError):
        LLM("no/such/folder", threads=1 if before > 1 else 2)
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------------------- prompts

NOT_PROMPTS: list[tuple[Any, str]] = [
    (None, "prompts=None is neither a string, a list of token ids, nor a list of these"),
    (5, "prompts=5 is neither a string"),
    ({"prompt": "x"}, "is neither a string"),
    (b"abc", "prompts=b'abc' is neither a string"),
    (np.array([5, 6]), "is neither a string"),
    (torch.tensor([5, 6]), "is neither a string"),
    ([None], "prompt 0 is None; use a string or a list of token ids"),
    (["fine", None], "prompt 1 is None"),
    (["fine", 5], "prompt 1 is 5"),
    ([{"prompt_token_ids": [5]}], "prompt 0 is {'prompt_token_ids': [5]}"),
    ([b"abc"], "prompt 0 is b'abc'"),
    ("", "the prompt is an empty string; give at least one character"),
    ([[]], "the prompt is empty; give at least one token"),
    (["fine", ""], "the prompt is an empty string"),
    ([5, 320], "token id 320 at position 1 of the prompt is outside of the vocabulary; use 0 to 319"),
    ([5, -1], "token id -1 at position 1 of the prompt is outside of the vocabulary"),
    ([5, 10**30], "is outside of the vocabulary"),
    ([2**31, 5], f"token id {2**31} at position 0 of the prompt is outside of the vocabulary"),
    ([True, 5], "token id True at position 0 of the prompt is of type bool; use Python's int"),
    ([5, 6.0], "token id 6.0 at position 1 of the prompt is of type float"),
    ([5, "6"], "token id '6' at position 1 of the prompt is of type str"),
    ([[5, np.int64(6)]], "token id np.int64(6) at position 1 of the prompt is of type int64; use Python's int"),
    (
        [5] * 128,
        "the prompt has 128 tokens, but the context of max_model_len=128 must also hold at least one",
    ),
    ("\ud800", "the prompt cannot be encoded: character 0 is half a surrogate pair"),
]


@pytest.mark.parametrize(("prompts", "words"), NOT_PROMPTS, ids=lambda value: repr(value)[:40])
def test_what_is_no_prompt(llm: LLM, prompts: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, GREEDY)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "the prompt is of type NoneType; use a string or a list of token ids"),
        (b"abc", "the prompt is of type bytes"),
        ({"prompt": "x"}, "the prompt is of type dict"),
        (np.array([5, 6]), "the prompt is of type ndarray"),
        (["a", "b"], "token id 'a' at position 0 of the prompt is of type str"),
        ([], "the prompt is empty"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_prompt_for_a_stream(llm: LLM, prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        next(llm.stream(prompt, GREEDY))
    with pytest.raises(RequestError, match=words):
        llm.engine.add_request(prompt, GREEDY)


@pytest.mark.parametrize(
    "messages", [None, 5, "hello", [], [[]], [None], {"role": "user"}, [{"role": "user"}]], ids=str
)
def test_what_is_no_conversation(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match=r"messages"):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", 0.5, [{}], [None], [GREEDY] * 2, []], ids=str)
def test_what_is_no_sampling_params(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match="sampling_params"):
        llm.generate("x", params)
    if not isinstance(params, list):
        with pytest.raises(RequestError, match=r"sampling_params=.* is not SamplingParams"):
            next(llm.stream("x", params))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": float("nan")}, "temperature=nan is not a number from 0 to 100"),
        ({"temperature": -1}, "temperature=-1 is not a number"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0 would give 2 identical samples"),
        ({"max_tokens": 0}, "max_tokens=0 is not an integer of at least 1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is above max_tokens=8"),
        ({"temprature": 1.0}, "SamplingParams has no option 'temprature'; did you mean 'temperature'?"),
        ({"stop_token_ids": [320]}, "stop_token_ids names token 320; this model has tokens 0 to 319"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names token -1"),
    ],
    ids=str,
)
def test_sampling_that_cannot_be_served(llm: LLM, options: dict[str, Any], words: str) -> None:
    """Unknown names are a ConfigError, all else a RequestError; both are a ValueError."""
    with pytest.raises(ValueError, match=r".") as caught:
        llm.generate(["x", "y"], [GREEDY, SamplingParams(**options)])
    assert isinstance(caught.value, FlexMoEError)
    assert words in str(caught.value)


def test_as_many_params_as_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts; give one for all or one for each"):
        llm.generate(["x", "y", "z"], [GREEDY, replace(GREEDY, max_tokens=2)])


# -------------------------------------------------------------------------------------------------- the command line


def refused(*arguments: str) -> str:
    """The one line on stderr of `flexmoe generate -q ...`, run as a program, which must fail."""
    command = [sys.executable, "-m", "flexmoe", "generate", "-q", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 1, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize(
    "damage", [truncated_shard, wrong_shape, only_pickle, malformed_config], ids=lambda d: d.__name__
)
def test_the_command_refuses_a_damaged_model(damage: Damage, tmp_path: Path) -> None:
    assert DAMAGES[damage][1] in refused("x", "-m", str(damaged(damage, tmp_path)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["", "-m", "MODEL"], "the prompt is an empty string"),
        (["word " * 200, "-m", "MODEL"], "but the context of max_model_len=128 must also hold"),
        (["x", "-t", "nan"], "temperature=nan is not a number"),
        (["x", "-m", "MODEL", "--kv-cache-memory", "1kB"], "kv_cache_memory=1000 bytes holds no block"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_command_refuses_a_request(arguments: list[str], words: str) -> None:
    model = str(tiny("mixtral"))
    assert words in refused(*(model if word == "MODEL" else word for word in arguments))


def test_the_command_refuses_token_ids_of_another_model(tmp_path: Path) -> None:
    """All prompts are refused for one; nothing is printed for the others."""
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([[5, 6], [5, 320]]))
    assert "token id 320 at position 1" in refused("-f", str(file), "-m", str(tiny("mixtral")))
