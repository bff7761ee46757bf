"""benchmarks/convert_gguf.py: each tensor of a Mixtral checkpoint in its place and format in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexmoe.config.engine import LoadConfig
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights
from tests.cpu.tiny_decoders import empty
from tests.cpu.tiny_models import tiny

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The tiny model that the comparison uses for a quick look."""
    from harness.random_model import make_model

    make_model("tiny", tmp_path / "model")
    return tmp_path / "model"


def test_the_same_numbers_in_every_format(made: Path, tmp_path: Path) -> None:
    from convert_gguf import convert

    files = [tmp_path / f"m.{kind}.gguf" for kind in ("f32", "bf16", "q8_0")]
    convert(made, files)
    source = open_model(LoadConfig(model=str(made)))
    model = empty(source.config)
    load_weights(source, model.weights())
    ours = model.weights()
    exact, half, eight = map(tensors, files)
    assert exact.keys() == half.keys() == eight.keys()
    assert len(exact) == 3 + 2 * 10
    for name, expected in (
        ("token_embd.weight", ours["embed_tokens.weight"]),
        ("blk.1.ffn_down_exps.weight", ours["layers.1.moe.experts.down"]),
        ("blk.0.ffn_up_exps.weight", ours["layers.0.moe.experts.gate_up"][:, 64:]),
        ("blk.0.ffn_gate_inp.weight", ours["layers.0.moe.router.weight"]),
        ("blk.0.attn_v.weight", ours["layers.0.attention.qkv.weight"][-64:]),
    ):
        assert torch.equal(torch.tensor(exact[name].data), expected), name
        wide = gguf.quants.dequantize(half[name].data, half[name].tensor_type)
        assert np.array_equal(wide, exact[name].data), "the weights are bf16"
    assert eight["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight"):
        assert eight[name].tensor_type == half[name].tensor_type == gguf.GGMLQuantizationType.F32
    fields = gguf.GGUFReader(files[0]).fields
    assert fields["llama.expert_used_count"].contents() == 2
    assert fields["llama.vocab_size"].contents() == 320


def test_rows_of_queries_and_keys_become_neighbours(made: Path, tmp_path: Path) -> None:
    """Rotating rows i and i + D/2 there is rotating rows 2i and 2i + 1 here."""
    from convert_gguf import convert

    convert(made, [tmp_path / "m.f32.gguf"])
    source = open_model(LoadConfig(model=str(made)))
    model = empty(source.config)
    load_weights(source, model.weights())
    query = model.weights()["layers.1.attention.qkv.weight"][:128]  # two heads of 64
    theirs = torch.tensor(tensors(tmp_path / "m.f32.gguf")["blk.1.attn_q.weight"].data)
    for head in range(2):
        ours, other = query[64 * head : 64 * head + 64], theirs[64 * head : 64 * head + 64]
        assert torch.equal(other[0::2], ours[:32])
        assert torch.equal(other[1::2], ours[32:])


@pytest.mark.parametrize("name", ["mixtral-window", "mixtral-tied", "olmoe"])
def test_models_that_it_would_get_wrong_are_refused(name: str, tmp_path: Path) -> None:
    from convert_gguf import convert

    with pytest.raises(ValueError, match="only a Mixtral model with plain rotary positions"):
        convert(tiny(name), [tmp_path / "m.f32.gguf"])
    assert not list(tmp_path.iterdir())
