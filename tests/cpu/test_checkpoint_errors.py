"""Damaged, foreign and missing checkpoints: each refused with its reason and a remedy, before a tensor is touched."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flexmoe.config.engine import LoadConfig
from flexmoe.errors import CheckpointError, ConfigError, MissingTensorError, TensorShapeError, UnsupportedModelError
from flexmoe.models import checkpoint, families, hub
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights
from tests.cpu.tiny_models import copy_of, edit_config, tiny

SHARD = "model-00002-of-00006.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A Mixtral in one file."""
    return copy_of(tiny("mixtral"), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Mixtral in six files and an index."""
    return copy_of(tiny("mixtral", sharded=True), tmp_path / "model")


def assert_refused(folder: Path, message: str, kind: type[Exception] = CheckpointError) -> str:
    """open_model refuses the folder; so does load_weights alone, and it leaves the tensors as they were."""
    with pytest.raises(kind, match=message) as caught:
        open_model(LoadConfig(model=str(folder)))
    dummy = open_model(LoadConfig(model=str(folder), load_format="dummy"))
    params = {name: torch.full(p.shape, 7.0) for name, p in families.parameters(dummy.config).items()}
    with pytest.raises(kind, match=message):
        load_weights(dummy, params)
    assert all(bool(tensor.eq(7).all()) for tensor in params.values())
    return str(caught.value)


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


# ------------------------------------------------------------------------------------------------ files


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    assert_refused(sharded, f"lacks 1 of 6 weight files: {SHARD}; download them again")
    (sharded / checkpoint.INDEX).unlink()  # the other files' names tell the same
    assert_refused(sharded, f"lacks 1 of 6 weight files: {SHARD}")


def test_truncated_shard(sharded: Path) -> None:
    data = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(data[:-1000])
    message = f"{SHARD} is truncated: {len(data):,} bytes expected by its header, {len(data) - 1000:,} found"
    assert_refused(sharded, message)
    (sharded / SHARD).write_bytes(data[:100])  # within the header
    assert_refused(sharded, f"{SHARD} is truncated")
    (sharded / SHARD).write_bytes(b"")
    assert_refused(sharded, rf"{SHARD} is truncated: 10 bytes expected .*, 0 found")


def test_damaged_shard(sharded: Path) -> None:
    data = (sharded / SHARD).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    (sharded / SHARD).write_bytes(data + b"more")
    assert_refused(sharded, f"{SHARD} is damaged: {len(data):,} bytes by its header, {len(data) + 4:,} in fact")
    (sharded / SHARD).write_bytes(data[:8] + b"?" * length + data[8 + length :])
    assert_refused(sharded, "its header is not JSON")
    (sharded / SHARD).write_bytes(struct.pack("<Q", 2) + b"[]")
    assert_refused(sharded, "its header is not an object")
    (sharded / SHARD).write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    assert_refused(sharded, "is not a safetensors file: its header would be")
    (sharded / SHARD).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert_refused(sharded, "is a Git LFS pointer, not the weights; run `git lfs pull`")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2]}, "entry for x is malformed"),
        ({"dtype": "F32", "shape": "no", "data_offsets": [0, 8]}, "entry for x is malformed"),
        (None, "entry for x is malformed"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, r"x is F32 of shape \[3\] but has 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "x is F32"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "x is F32"),
        ({"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 8]}, "entry for x is malformed"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "x does not begin where"),
    ],
)
def test_lying_header(tmp_path: Path, entry: Any, message: str) -> None:
    header = json.dumps({"x": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_header(file)


@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 300))
def test_any_damage_is_found_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, file)
    data = bytearray(file.read_bytes())
    data[place % len(data)] = byte
    file.write_bytes(data[: len(data) - cut])
    try:
        tensors = checkpoint.read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)  # noqa: PT017 (the error is one of two right outcomes)
    else:
        assert sum(tensor.num_bytes for tensor in tensors) <= len(data)


def test_unreadable_file(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Permission denied"):
        checkpoint.open_checkpoint(single)


def test_damaged_index(sharded: Path) -> None:
    index = sharded / checkpoint.INDEX
    good = json.loads(index.read_text())
    index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], "model.extra": SHARD}}))
    assert_refused(sharded, "lists model.extra, but no file holds it", MissingTensorError)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
    assert_refused(sharded, "names files outside its own folder")
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        assert_refused(sharded, "is damaged: it is no JSON object with a weight_map")


def test_the_same_tensor_in_two_files(sharded: Path) -> None:
    shutil.copy(sharded / SHARD, sharded / "other.safetensors")
    (sharded / checkpoint.INDEX).unlink()
    assert_refused(sharded, f"is in both {SHARD} and other.safetensors")


# ------------------------------------------------------------------------------------------------ tensors


def test_wrong_shapes(single: Path) -> None:
    assert_refused(
        edit_config(single, vocab_size=300), "lm_head.weight is .320, 64. instead of .300, 64.", TensorShapeError
    )
    edit_config(single, vocab_size=320, intermediate_size=40)
    message = assert_refused(single, "w1.weight is .48, 64. instead of .40, 64.", TensorShapeError)
    assert "and 19 more" in message
    assert message.count("instead of") == 5


def test_missing_tensors(single: Path) -> None:
    names = [f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight" for i in range(4)]
    edit_tensors(single, lambda tensors: [tensors.pop(name) for name in (*names, "model.norm.weight")])
    message = assert_refused(single, "lacks 5 tensors that config.json asks for", MissingTensorError)
    assert all(name in message for name in (*names, "model.norm.weight"))
    assert "more" not in message
    message = assert_refused(edit_config(single, num_hidden_layers=4), "lacks 43 tensors", MissingTensorError)
    assert message.endswith("and 38 more.")


def test_untied_head_is_missing(tmp_path: Path) -> None:
    folder = edit_config(copy_of(tiny("qwen2"), tmp_path), tie_word_embeddings=False)
    assert_refused(folder, r"lacks 1 tensors .*: lm_head\.weight", MissingTensorError)


def test_unexpected_tensors(single: Path) -> None:
    edit_tensors(
        single, lambda tensors: tensors.update({f"model.layers.0.adapter.{i}": torch.ones(1) for i in range(7)})
    )
    message = assert_refused(single, r"has no place for: model\.layers\.0\.adapter\.0")
    assert "and 2 more" in message
    assert_refused(edit_config(copy_of(tiny("llama"), single), num_hidden_layers=1), r"no place for: .*layers\.1\.")


def test_a_bias_that_config_json_denies(tmp_path: Path) -> None:
    folder = edit_config(copy_of(tiny("llama-mha-bias"), tmp_path), attention_bias=False)
    assert_refused(folder, r"no place for: .*self_attn\..*bias")


def test_two_forms_of_the_same_experts(single: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    edit_tensors(single, lambda tensors: tensors.update({name: torch.ones(4, 64, 48)}))
    assert_refused(single, "are two forms of the same weights; keep one of them")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_number_formats_that_are_not_served(single: Path, dtype: torch.dtype) -> None:
    edit_tensors(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    assert_refused(single, r"not supported: model\.norm\.weight is \w+. Supported: F32, BF16, F16")


# ------------------------------------------------------------------------------------------------ other formats


def without_weights(folder: Path, *names: str) -> Path:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_pickle_is_refused_and_the_given_command_converts_it(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
    message = assert_refused(without_weights(single), r"only pickle files \(pytorch_model\.bin\)")
    command = re.search(r'python -c "(.+)"$', message, re.MULTILINE)
    assert command is not None
    monkeypatch.chdir(single.parent)
    exec(command[1], {})
    converted = open_model(LoadConfig(model="model-safetensors"))
    assert converted.config == open_model(LoadConfig(model=str(tiny("mixtral")))).config
    assert (single.parent / "model-safetensors" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "only pickle files.*can run code"),
        (["consolidated.00.pth", "params.json"], r"publisher's own format \(consolidated\.00\.pth\)"),
        (["model.pt"], r"publisher's own format \(model\.pt\)"),
        (["consolidated.safetensors"], r"publisher's own format \(consolidated\.safetensors\)"),
        (["model-Q4_K_M.gguf"], r"only GGUF \(model-Q4_K_M\.gguf\). Use the model that it was made from"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter; merge it"),
        ([], r"needs model\.safetensors or model\.safetensors\.index\.json"),
    ],
)
def test_folders_of_other_formats(single: Path, names: list[str], message: str) -> None:
    without_weights(single, *names)
    assert_refused(single, message)
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        open_model(LoadConfig(model=str(single)))


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1,}', r"config\.json is not JSON: .*, line 1, column \d"),
        (b"", "is not JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"\xff\xfe{", "is not UTF-8 text"),
        (b"{}", "neither architectures nor model_type"),
        (b'{"architectures": "LlamaForCausalLM"}', "architectures='LlamaForCausalLM' is not a list"),
    ],
)
def test_malformed_config_json(single: Path, text: bytes, message: str) -> None:
    (single / "config.json").write_bytes(text)
    for load_format in ("auto", "dummy"):
        with pytest.raises(ConfigError, match=message):
            open_model(LoadConfig(model=str(single), load_format=load_format))


def test_malformed_generation_config(single: Path) -> None:
    (single / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json is not JSON"):
        open_model(LoadConfig(model=str(single)))


def test_quantized_models_are_refused_by_name(single: Path) -> None:
    edit_config(single, quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModelError, match=r"names the method 'awq', whose weights are not read here; take"):
        open_model(LoadConfig(model=str(single)))


def test_no_config_json(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json, which says how"):
        open_model(LoadConfig(model=str(single)))


# ------------------------------------------------------------------------------------------------ names


def test_names_that_are_no_folder(single: Path) -> None:
    for name in ("./nowhere", "/nowhere", "~/nowhere", "a/b/c", "models/"):
        with pytest.raises(CheckpointError, match=r"the folder .* does not exist"):
            open_model(LoadConfig(model=name))
    with pytest.raises(CheckpointError, match="model is an empty name"):
        open_model(LoadConfig(model=" "))
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        open_model(LoadConfig(model=str(single / "config.json")))
    with pytest.raises(CheckpointError, match="no folder 'not an id!' exists, and it is no hub id either"):
        open_model(LoadConfig(model="not an id!"))


def test_no_builtin_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "_BUILTIN", tmp_path)
    with pytest.raises(CheckpointError, match="lacks its built-in model"):
        open_model(LoadConfig())
    copy_of(tiny("llama"), tmp_path)
    assert open_model(LoadConfig()).name == "builtin"


def test_builtin_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The name that a server and `flexmoe models` call it; a folder of that name comes before it."""
    monkeypatch.chdir(tmp_path)
    assert LoadConfig(model="builtin") == LoadConfig()
    assert open_model(LoadConfig(model="builtin")).folder == hub._BUILTIN
    (tmp_path / "builtin").mkdir()
    copy_of(tiny("llama"), tmp_path / "builtin")
    assert open_model(LoadConfig(model="builtin")).config.architecture == "LlamaForCausalLM"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty hub cache, and no way to the hub (tests/conftest.py)."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.is_offline_mode()
    return tmp_path / "hub"


def test_hub_id_that_is_not_cached_offline(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"taken for a Hugging Face hub id; .*`hf download some/model`"):
        open_model(LoadConfig(model="some/model"))
    with pytest.raises(CheckpointError, match=r"hub id; .*Presets: mixtral-8x7b, .*tinymistral-6x248m\."):
        open_model(LoadConfig(model="mixtral-8x7", load_format="dummy"))


@pytest.mark.parametrize(("name", "meant"), [("bulitin", "builtin"), ("mixtral-8x7", "mixtral-8x7b")])
def test_a_misspelt_name(hub_cache: Path, name: str, meant: str) -> None:
    with pytest.raises(CheckpointError, match=rf"Did you mean '{meant}'\?$"):
        open_model(LoadConfig(model=name))


def test_hub_id_that_is_cached_opens_offline(hub_cache: Path) -> None:
    repository, commit = hub_cache / "models--some--model", "0" * 40
    copy_of(tiny("mixtral", sharded=True), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    source = open_model(LoadConfig(model="some/model"))
    assert source.folder == repository / "snapshots" / commit
    assert len(source.matches) == 41


def test_downloads_ask_for_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def download(model: str, **options: Any) -> str:
        asked.append({"model": model, **options})
        return str(tiny("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_model(LoadConfig(model="some/model", revision="v2"))
    open_model(LoadConfig(model="some/model", load_format="dummy"))
    assert [(a["model"], a["revision"], "*.safetensors" in a["allow_patterns"]) for a in asked] == [
        ("some/model", "v2", True),
        ("some/model", None, False),
    ]
    assert "consolidated*" in asked[0]["ignore_patterns"]
    assert asked[0]["tqdm_class"](total=1).disable


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "the hub has no such model, or it is private: then run `hf auth login`"),
        ("GatedRepoError", "the model is gated: accept its terms on https://huggingface.co/some/model"),
        ("RevisionNotFoundError", "the model has no revision 'v9'"),
        ("OSError", "the download failed: No space left"),
    ],
)
def test_failed_downloads_are_explained(monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error, OSError)

    def download(model: str, **options: Any) -> str:
        raise kind.__new__(kind) if kind is not OSError else OSError("No space left")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_model(LoadConfig(model="some/model", revision="v9"))
