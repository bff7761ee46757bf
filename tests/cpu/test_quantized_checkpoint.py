"""Checkpoints of `flexmoe quantize`: what they hold, that loading them is rounding at load, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open

from flexmoe import LLM
from flexmoe.cli.main import main
from flexmoe.config.engine import LoadConfig
from flexmoe.config.packing import Packing
from flexmoe.config.server import ServerConfig
from flexmoe.errors import CheckpointError, ConfigError, MissingTensorError, TensorShapeError, UnsupportedModelError
from flexmoe.kernels.quantize import QuantizedMatrix
from flexmoe.models import save_quantized as writer
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights
from flexmoe.models.save_quantized import save_quantized
from flexmoe.verify.quality import measure
from tests.cpu.tiny_decoders import empty
from tests.cpu.tiny_models import CASES, copy_of, edit_config, make, tiny

GREEDY = ["--max-tokens", "8", "--temperature", "0"]


def packed(source: Path, out: Path, bits: int = 8, group: int = 32) -> Path:
    save_quantized(open_model(LoadConfig(model=str(source))), Packing(bits, group), out)
    return out


def held(folder: Path, quantization: str | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of the decoder once the folder is loaded, codes and scales apart."""
    source = open_model(LoadConfig(model=str(folder)))
    model = empty(source.config)
    model.quantize(quantization or source.packing.quantization)  # type: ignore[union-attr]
    load_weights(source, model.weights())
    found = {}
    for name, weight in model.weights().items():
        if isinstance(weight, QuantizedMatrix):
            found |= {f"{name} codes": weight.codes, f"{name} scales": weight.scales}
        else:
            found[name] = weight
    return found


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def command(*words: str) -> Result:
    return CliRunner().invoke(main, ["quantize", *words])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["mixtral", "olmoe-odd", "qwen2_moe", "qwen3_moe-odd", "llama-tied-llama3"])
def test_loading_it_is_rounding_at_load_bit_for_bit(name: str, bits: int, tmp_path: Path) -> None:
    folder = packed(tiny(name), tmp_path / "out", bits)
    assert_same(held(folder), held(tiny(name), f"int{bits}"))


@pytest.mark.parametrize("bits", [8, 4])
def test_in_pieces_in_shards_and_with_fused_experts(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(CASES["qwen3_moe"], tmp_path / "fused", layout="fused")
    expected = held(source, f"int{bits}")
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(writer, "_SHARD_BYTES", 50_000)
    folder = packed(source, tmp_path / "out", bits)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((folder / name).stat().st_size < 60_000 for name in files)
    assert_same(held(folder), expected)


def test_what_the_files_hold(tmp_path: Path) -> None:
    """As docs/quantization.md says."""
    full = make(replace(CASES["mixtral"], options={"intermediate_size": 64}), tmp_path / "full")
    folder = packed(full, tmp_path / "out", 4, 64)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "flexmoe", "bits": 4, "group_size": 64}
    assert config["dtype"] == json.loads((full / "config.json").read_text())["dtype"]
    assert (folder / "tokenizer.json").is_file()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    query = found["model.layers.0.self_attn.q_proj.weight"]
    assert (query.dtype, query.shape) == (torch.uint8, (64, 32))
    scale = found["model.layers.0.self_attn.q_proj.weight_scale"]
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (64, 1))
    table = found["model.embed_tokens.weight"]
    assert (table.dtype, table.shape) == (torch.int8, (320, 64))
    assert found["model.norm.weight"].dtype == torch.float32
    source = open_model(LoadConfig(model=str(full)))
    model = empty(source.config)
    load_weights(source, model.weights())
    exact = model.weights()["layers.0.attention.qkv.weight"][:64]
    assert isinstance(exact, torch.Tensor)
    codes = torch.cat([part for half in query.split(16, 1) for part in (half & 15, half >> 4)], 1).float() - 8
    assert torch.equal(scale, (exact.abs().amax(1, keepdim=True) / 7).bfloat16())
    assert (codes * scale.float() - exact).abs().max() <= scale.float().max() * 0.54


def test_the_command_and_the_engine_without_an_option(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "builtin-int8"
    result = command("builtin", str(folder))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}: int8 in groups of 32, 35.06 MiB of weights in 18.65 MiB, 1 file\n"
    assert [file.name for file in folder.parent.iterdir()] == ["builtin-int8"]
    words = ["generate", "Once upon a time", "--threads", "1", *GREEDY]
    ours = CliRunner().invoke(main, [*words, "--model", str(folder)])
    at_load = CliRunner().invoke(main, [*words, "--quantization", "int8"])
    assert ours.exit_code == 0, ours.output
    assert ours.stdout == at_load.stdout
    with LLM(folder, threads=1) as llm:
        assert llm.describe()["quantization"] == "int8"
        assert llm.describe()["dtype"] == "bfloat16"
    with LLM(folder, threads=1, quantization="int8", load_format="dummy") as llm:
        assert len(llm.generate([[1, 2, 3]])[0].token_ids) > 0
    assert replace(measure(None, str(folder), threads=1), quantization="int8") == measure(None, "int8", threads=1)


def test_what_the_command_refuses(tmp_path: Path) -> None:
    folder, new = packed(tiny("mixtral"), tmp_path / "out"), str(tmp_path / "new")
    for words, message in (
        ([str(folder), new], "out is quantized already, to int8; rounding twice loses more: give the full model."),
        ([str(tiny("mixtral")), str(folder)], "out exists already; name a new folder, or remove it first."),
        ([str(tiny("mixtral")), new, "--group", "48"], "group_size=48 is not a positive multiple of 32; use 32."),
        (
            [str(tiny("mixtral")), new, "--group", "64"],
            "group_size=64 does not divide the 48 columns of model.layers.0.block_sparse_moe.experts.0.w2.weight; "
            "use 32, whose last group may be shorter.",
        ),
        (["mixtral-8x7b", new], "'mixtral-8x7b' is a preset"),
    ):
        result = command(*words)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_nothing_is_left_of_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_item", fail)
    with pytest.raises(CheckpointError, match="out cannot be written: No space left on device"):
        packed(tiny("mixtral"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_loading_refuses(tmp_path: Path) -> None:
    folder = packed(tiny("mixtral"), tmp_path / "out")
    for options, message in (
        ({"quantization": "int4"}, "quantization='int4', but .* holds int8 weights already; leave it out"),
        ({"tensor_parallel_size": 2}, "quantization='int8' needs one process, not 2 ranks; use one, or full weights"),
        ({"expert_backend": "reference"}, "quantization='int8' does not work with expert_backend='reference'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(folder, device="cpu", **options)
    with pytest.raises(ConfigError, match="holds int8 weights; name the full model"):
        measure(str(folder), "int8", threads=1)
    with pytest.raises(ConfigError, match="holds full weights; give int8, int4 or a folder"):
        measure(str(tiny("mixtral")), str(tiny("mixtral")), threads=1)
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert "holds int8 weights, which transformers cannot read; compare it with the model that" in result.stderr


def test_the_server_does_not_compare_it_with_transformers(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from flexmoe.server.rivals import rival_of

    engine: Any = SimpleNamespace(model_folder=packed(tiny("mixtral"), tmp_path / "out"), tokenizer=object())
    with pytest.raises(ConfigError, match=r"compare='hf': transformers cannot read the quantized weights of .*out"):
        rival_of(ServerConfig(compare="hf"), engine)


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, UnsupportedModelError, "names the method 'gptq', whose weights are not"),
        ({"bits": 4}, UnsupportedModelError, "names the method None"),
        ({"quant_method": "flexmoe", "bits": 8}, ConfigError, r"has keys \['bits'\]; it needs bits and group_size"),
        ({"quant_method": "flexmoe", "bits": 3, "group_size": 32}, ConfigError, "bits=3 is not one of 8, 4"),
        ({"quant_method": "flexmoe", "bits": 8, "group_size": "x"}, ConfigError, "group_size='x' is not a positive"),
        (
            {"quant_method": "flexmoe", "bits": 4, "group_size": 32},
            TensorShapeError,
            r"w1.weight is \[48, 64\] instead of \[48, 32\]",
        ),
        (..., CheckpointError, "has no place for: .*_scale"),
    ],
)
def test_configurations_that_do_not_fit(entry: object, kind: type[Exception], message: str, tmp_path: Path) -> None:
    folder = edit_config(packed(tiny("mixtral"), tmp_path / "out"), quantization_config=entry)
    with pytest.raises(kind, match=message):
        open_model(LoadConfig(model=str(folder)))


def test_scales_that_are_missing(tmp_path: Path) -> None:
    full = copy_of(tiny("mixtral"), tmp_path / "full")
    edit_config(full, quantization_config=Packing(8).to_json())
    with pytest.raises(MissingTensorError, match=r"lacks .*weight_scale, the scales of its quantized weights"):
        open_model(LoadConfig(model=str(full)))


def test_a_few_rows_at_a_time_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the built-in model's 35 MB; mapped files, which the system may drop, are not counted."""
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 2**18)
    source = open_model(LoadConfig())
    save_quantized(source, Packing(4), tmp_path / "first")  # what torch allocates once
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())

    def watch() -> None:
        while not done.is_set():
            look()
            time.sleep(0.001)

    raw = writer._raw  # a busy machine may not let the other thread look while there is something to be seen
    monkeypatch.setattr(writer, "_raw", lambda tensor: (look(), raw(tensor))[1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    save_quantized(source, Packing(4), tmp_path / "second")
    done.set()
    watcher.join()
    assert 0 < peak - before < 8 * 2**20


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024
