"""Loading: every tensor in its place for each family, layout, spelling and dtype; slots, memory, progress, dummies."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmoe.config.engine import LoadConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.config.shard import Shard
from flexmoe.errors import CheckpointError
from flexmoe.models import families
from flexmoe.models.hub import ModelSource, open_model
from flexmoe.models.loader import LoadReport, fill_dummy, load_weights
from tests.cpu.tiny_models import CASES, copy_of, edit_config, tiny

MOE = [name for name, case in CASES.items() if case.is_moe]


def open_folder(folder: Path) -> ModelSource:
    return open_model(LoadConfig(model=str(folder)))


def empty(source: ModelSource, dtype: torch.dtype = torch.float32, slots: int | None = None) -> dict[str, torch.Tensor]:
    """The decoder's parameters, not a number anywhere."""
    shapes = {name: p.shape for name, p in families.parameters(source.config).items()}
    if slots is not None:
        shapes = {name: (slots, *shape[1:]) if len(shape) == 3 else shape for name, shape in shapes.items()}
    return {name: torch.full(shape, math.nan, dtype=dtype) for name, shape in shapes.items()}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = open_folder(folder)
    params = empty(source, dtype)
    load_weights(source, params)
    return params


def by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    """What our parameters must hold, put together from the model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {"embed_tokens.weight": model.model.embed_tokens.weight, "norm.weight": model.model.norm.weight}
    if not model.config.tie_word_embeddings:
        expected["lm_head.weight"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        ours = {**_attention(layer), **_feed_forward(layer.mlp)}
        expected |= {f"layers.{i}.{name}": tensor for name, tensor in ours.items()}
    return {name: tensor.detach() for name, tensor in expected.items()}


def _attention(layer: Any) -> dict[str, torch.Tensor]:
    a = layer.self_attn
    out = {
        "input_norm.weight": layer.input_layernorm.weight,
        "mlp_norm.weight": layer.post_attention_layernorm.weight,
        "attention.qkv.weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
        "attention.out.weight": a.o_proj.weight,
    }
    if a.q_proj.bias is not None:
        out["attention.qkv.bias"] = torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias])
    if a.o_proj.bias is not None:
        out["attention.out.bias"] = a.o_proj.bias
    if hasattr(a, "q_norm"):
        out |= {"attention.q_norm.weight": a.q_norm.weight, "attention.k_norm.weight": a.k_norm.weight}
    return out


def _feed_forward(mlp: Any) -> dict[str, torch.Tensor]:
    if not hasattr(mlp, "experts"):
        return _swiglu("mlp", mlp)
    out = {
        "moe.router.weight": mlp.gate.weight,
        "moe.experts.gate_up": mlp.experts.gate_up_proj,
        "moe.experts.down": mlp.experts.down_proj,
    }
    if hasattr(mlp, "shared_expert"):
        out |= {"moe.shared_gate.weight": mlp.shared_expert_gate.weight, **_swiglu("moe.shared", mlp.shared_expert)}
    return out


def _swiglu(name: str, mlp: Any) -> dict[str, torch.Tensor]:
    out = {
        f"{name}.gate_up.weight": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        f"{name}.down.weight": mlp.down_proj.weight,
    }
    if mlp.down_proj.bias is not None:
        out[f"{name}.gate_up.bias"] = torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias])
        out[f"{name}.down.bias"] = mlp.down_proj.bias
    return out


def assert_same(params: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert params.keys() == expected.keys()
    for name, tensor in params.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_where_transformers_has_it(case: str) -> None:
    assert_same(load(tiny(case)), by_transformers(tiny(case)))


@pytest.mark.parametrize("case", CASES)
def test_every_config_means_what_transformers_makes_of_it(case: str) -> None:
    from transformers import AutoConfig

    theirs, ours = AutoConfig.from_pretrained(tiny(case)), open_folder(tiny(case)).config
    rope = theirs.rope_parameters
    assert ours.attention.rope.theta == rope["rope_theta"]
    assert ours.attention.rope.kind == rope["rope_type"]
    assert ours.attention.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // 4)
    assert ours.attention.num_kv_heads == theirs.num_key_value_heads
    assert (ours.norm_eps, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.num_layers
    window = getattr(theirs, "sliding_window", None) or None
    assert [layer.window for layer in ours.layers] == [window if "sliding" in kind else None for kind in kinds]


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe-odd", "llama-tied-llama3"])
def test_shards_and_old_spelling_change_nothing(case: str) -> None:
    folder = tiny(case, sharded=True, spelling="old")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(load(folder), load(tiny(case)))
    assert open_folder(folder).config == open_folder(tiny(case)).config


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen2_moe-odd", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_expert_layouts_change_nothing(case: str, layout: Any) -> None:
    assert_same(load(tiny(case, layout=layout)), load(tiny(case)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype: str) -> None:
    folder = tiny("mixtral", dtype=dtype)
    assert open_folder(folder).config.checkpoint_dtype == dtype
    assert_same(load(folder, getattr(torch, dtype)), {n: t.to(getattr(torch, dtype)) for n, t in load(folder).items()})


def test_conversion_on_the_way() -> None:
    full = load(tiny("qwen3_moe"))
    assert_same(load(tiny("qwen3_moe"), torch.bfloat16), {name: t.bfloat16() for name, t in full.items()})


def test_dtype_from_the_weights_where_config_json_is_silent(tmp_path: Path) -> None:
    folder = edit_config(copy_of(tiny("llama", dtype="float16"), tmp_path), dtype=...)
    assert open_folder(folder).config.checkpoint_dtype == "float16"


@pytest.mark.parametrize("layout", ["saved", "fused"])
def test_a_rank_reads_its_slots_only_and_fills_replicas(layout: Any) -> None:
    source = open_folder(tiny("mixtral", layout=layout))
    full = empty(source)
    whole = load_weights(source, full)
    placement = ExpertPlacement(4, ((0, 2), (3, 1, 3)))
    slots = list(placement.local_slots(1))
    params = empty(source, slots=len(slots))
    plan = ParallelPlan(expert_parallel_size=2, data_parallel_size=2, placements={None: placement})
    part = load_weights(source, params, Shard(plan, source.config, rank=1))
    assert_same(params, {name: t[slots] if t.dim() == 3 else t for name, t in full.items()})
    experts = sum(t.nbytes for t in full.values() if t.dim() == 3)
    assert whole.bytes_read == sum(t.nbytes for t in full.values())
    assert part.bytes_read == whole.bytes_read - experts // 2  # three slots, but two experts of four


def test_parameters_that_are_not_asked_for_are_not_read() -> None:
    source = open_folder(tiny("llama", sharded=True))
    params = {name: t for name, t in empty(source).items() if name.startswith("layers.1.")}
    report = load_weights(source, params)
    assert report.bytes_read == sum(t.nbytes for t in params.values())
    assert report.num_files < len(list(tiny("llama", sharded=True).glob("*.safetensors")))
    assert not any(t.isnan().any() for t in params.values())


def test_large_tensors_are_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(tiny("qwen2_moe"))
    monkeypatch.setattr("flexmoe.models.loader._CHUNK_BYTES", 1000)
    assert_same(load(tiny("qwen2_moe")), expected)
    assert_same(load(tiny("qwen2_moe", layout="fused")), expected)


def test_known_leftovers_are_ignored(tmp_path: Path) -> None:
    folder = copy_of(tiny("qwen2"), tmp_path)  # tied
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(3)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors")
    assert_same(load(folder), load(tiny("qwen2")))


def test_files_of_any_name_without_an_index(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama", sharded=True), tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(next(folder.glob("model-00001*")), folder / name)
    assert_same(load(folder), load(tiny("llama")))


def test_loading_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    source = open_folder(tiny("mixtral", sharded=True))
    capfd.readouterr()
    report = load_weights(source, empty(source))
    assert report == LoadReport(report.seconds, 4 * source.config.num_parameters(), 41, 6)
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    source = open_folder(tiny("mixtral", sharded=True))
    load_weights(source, empty(source), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "model-00006-of-00006.safetensors" in err
    assert "kB" in err


def test_transformers_own_keys_are_all_known(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flexmoe.models"):
        for case in CASES:
            open_folder(tiny(case))
    assert not caplog.records


# ------------------------------------------------------------------------------------------------ dummy weights


def test_dummy_weights_need_config_json_only(tmp_path: Path) -> None:
    shutil.copy(tiny("mixtral") / "config.json", tmp_path)
    source = open_model(LoadConfig(model=str(tmp_path), load_format="dummy"))
    params = empty(source)
    fill_dummy(params, seed=3)
    assert not any(t.isnan().any() for t in params.values())
    assert source.matches == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_are_seeded_by_name(dtype: torch.dtype) -> None:
    source = open_folder(tiny("qwen2_moe"))
    first, second, other = empty(source, dtype), empty(source, dtype), empty(source, dtype)
    fill_dummy(first, seed=1)
    fill_dummy(dict(reversed(second.items())), seed=1)
    fill_dummy(other, seed=2)
    assert_same(first, second)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(first["layers.0.mlp_norm.weight"], first["layers.0.attention.qkv.weight"][0])
    assert not torch.equal(first["layers.0.moe.experts.down"], first["layers.1.moe.experts.down"])


def test_dummy_weights_have_the_right_scale() -> None:
    source = open_folder(tiny("qwen2_moe"))
    params = empty(source)
    fill_dummy(params)
    assert params["embed_tokens.weight"].std().item() == pytest.approx(1.0, rel=0.05)
    assert params["layers.0.moe.experts.gate_up"].std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert params["layers.0.moe.experts.down"].std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert params["norm.weight"].eq(1).all()
    assert params["layers.0.attention.qkv.bias"].eq(0).all()


def test_dummy_weights_wider_than_a_checkpoint_are_exact_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexmoe.models.loader._CHUNK_BYTES", 1000)  # several chunks
    source = open_folder(tiny("qwen2_moe"))
    params, plain = empty(source), empty(source)
    fill_dummy(params, stored=torch.bfloat16)
    fill_dummy(plain)
    for name, param in params.items():
        assert torch.equal(param, plain[name].bfloat16().float()), name


def test_dummy_source_can_still_load(tmp_path: Path) -> None:
    source = open_model(LoadConfig(model=str(tiny("llama")), load_format="dummy"))
    params = empty(source)
    load_weights(source, params)
    assert_same(params, load(tiny("llama")))
    preset = replace(source, folder=None)
    with pytest.raises(CheckpointError, match="load_format='dummy'"):
        load_weights(preset, params)


# ------------------------------------------------------------------------------------------------ peak memory

_MEASURE = """
import json, sys, threading, time
import psutil, torch
from pathlib import Path
from flexmoe.config.engine import LoadConfig
from flexmoe.models import families
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights

tiny, big = (open_model(LoadConfig(model=folder)) for folder in sys.argv[1:3])
def tensors(source):
    return {name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in families.parameters(source.config).items()}
load_weights(tiny, tensors(tiny))  # so that imports and torch's own tables are not counted
process = psutil.Process()
before, peak, done = process.memory_info().rss, 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
params = tensors(big)
load_weights(big, params)
done = True
thread.join()
peak = max(peak, process.memory_info().rss)  # on a busy machine the last look was long ago
assert all(bool(p.flatten()[-1].isfinite()) for p in params.values())
print(json.dumps({"growth": peak - before, "model": sum(p.nbytes for p in params.values())}))
"""


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_peak_memory_is_the_model_and_one_shard(tmp_path: Path, stored: torch.dtype) -> None:
    """A checkpoint of about 150 MB in bf16, 300 MB in fp32, in four shards of much the same size."""
    edit_config(copy_of(tiny("mixtral"), tmp_path), hidden_size=1024, intermediate_size=1536, num_hidden_layers=3)
    (tmp_path / "model.safetensors").unlink()
    shards = _write_shards(tmp_path, stored, 4)
    found = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tiny("mixtral")), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(found.stdout)
    assert measured["model"] > 100e6
    assert measured["growth"] > measured["model"] * 0.9
    assert measured["growth"] <= measured["model"] + max(shards) + 20e6


def _write_shards(folder: Path, dtype: torch.dtype, count: int) -> list[int]:
    """Zeros for every tensor, in the usual order; the bytes of each shard."""
    config = families.read_config(json.loads((folder / "config.json").read_text()))
    usual: dict[Any, str] = {}
    for name, piece in families.tensors(config).items():
        if not piece.fused:
            usual.setdefault(piece, name)
    total = sum(math.prod(piece.shape) for piece in usual)
    groups: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    done = 0
    for piece, name in usual.items():
        groups[min(done * count // total, count - 1)][name] = torch.zeros(piece.shape, dtype=dtype)
        done += math.prod(piece.shape)
    for i, group in enumerate(groups):
        save_file(group, folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors")
    return [sum(tensor.nbytes for tensor in group.values()) for group in groups]
