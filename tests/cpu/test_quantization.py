"""Weights of 8 and 4 bits: how they are rounded, loaded and computed with, in C and in torch, and what is refused."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from flexmoe import LLM, SamplingParams
from flexmoe.cli.main import main
from flexmoe.config.engine import EngineConfig, LoadConfig
from flexmoe.config.model import LayerConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import Shard
from flexmoe.engine import startup
from flexmoe.errors import ConfigError, RequestError
from flexmoe.kernels.cpu import levels
from flexmoe.kernels.quantize import QuantizedMatrix
from flexmoe.models import loader
from flexmoe.models.hub import open_model
from flexmoe.models.loader import load_weights
from flexmoe.models.quantized import weight_bytes
from flexmoe.verify.quality import measure
from tests.cpu.paging import scattered
from tests.cpu.test_native_decode import check
from tests.cpu.test_native_invariance import CONFIGS, LENGTHS, with_threads
from tests.cpu.tiny_decoders import NEEDS_COMPILER, by_c, config, copy_cache, decoder, empty, filled_cache
from tests.cpu.tiny_models import tiny

formats = pytest.mark.parametrize("quantization", ["int8", "int4"])
STEPS = {8: 127, 4: 7}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@given(
    n=st.integers(1, 5), k=st.integers(1, 100), bits=st.sampled_from([8, 4]), scale=st.sampled_from([1e-6, 1.0, 1e4])
)
def test_a_weight_is_off_by_half_a_step_at_most(n: int, k: int, bits: int, scale: float) -> None:
    weights = torch.randn(2, n, k) * scale
    matrix = QuantizedMatrix.empty(weights.shape, bits).copy_(weights)
    assert matrix.shape == weights.shape
    for start in range(0, k, 32):
        group = weights[..., start : start + 32]
        step = group.abs().amax(-1, keepdim=True) / STEPS[bits]
        off = (matrix.dequantize(torch.float32)[..., start : start + 32] - group).abs()
        # The scale itself is rounded to 8 bits: the largest weight may be clamped by so much of it.
        assert (off <= step * (0.502 + STEPS[bits] / 256)).all()
    assert torch.equal(matrix[1].dequantize(torch.float32), matrix.dequantize(torch.float32)[1])


@pytest.mark.parametrize("bits", STEPS)
def test_zeros_and_numbers_too_small_for_a_scale(bits: int) -> None:
    weights = torch.zeros(3, 70)
    weights[1] = 1e-42
    weights[2, 40] = -2.0
    found = QuantizedMatrix.empty(weights.shape, bits).copy_(weights).dequantize(torch.float32)
    assert (found[:2].abs() <= 1e-41).all()
    assert found[2].nonzero().tolist() == [[40]]
    assert abs(found[2, 40] + 2.0) < 0.02


@NEEDS_COMPILER
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", levels.available(), ids=lambda level: level.name)
def test_in_c_as_with_widened_weights_in_torch(level: levels.Level, dtype: torch.dtype, quantization: str) -> None:
    for name in ("odd", "many-experts"):
        model = decoder(CONFIGS[name], dtype, 2, level.name, quantization)
        check(model, [30, 1, 7, 16, 5, 90, 2, 33, 12], block_size=4)
    tied = config(tie_embeddings=True, layers=(LayerConfig(is_moe=False),))
    check(decoder(tied, dtype, 1, level.name, quantization), [3, 9], block_size=4)


@NEEDS_COMPILER
@formats
def test_alone_and_in_batches_with_1_to_3_threads(quantization: str) -> None:
    model = decoder(CONFIGS["odd"], torch.bfloat16, 1, quantization=quantization)
    requests, num_blocks = scattered(LENGTHS, 4, model.config.vocab_size)
    cache = filled_cache(model.config, requests, num_blocks, 4, torch.bfloat16)
    alone = torch.cat([by_c(model, [r], copy_cache(cache, torch.bfloat16)) for r in requests])
    for threads in (1, 2, 3):
        model.native = with_threads(model, threads)
        for count in (2, 3, 4, 7, 8, 9, 16, 64):
            logits = by_c(model, requests[:count], copy_cache(cache, torch.bfloat16))
            assert torch.equal(logits, alone[:count]), f"{count} rows, {threads} threads"


@formats
def test_loading_piece_by_piece_is_loading_whole(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(LoadConfig(model=str(tiny("mixtral"))))
    plain, model = empty(source.config), empty(source.config)
    load_weights(source, plain.weights())
    model.quantize(quantization)
    monkeypatch.setattr(loader, "_CHUNK_BYTES", 1000)
    load_weights(source, model.weights())
    full = plain.weights()
    quantized = {name: w for name, w in model.weights().items() if isinstance(w, QuantizedMatrix)}
    assert "embed_tokens.weight" in quantized
    assert "layers.0.moe.experts.gate_up" in quantized
    assert not any("norm" in name or "router" in name for name in quantized)
    for name, matrix in quantized.items():
        whole = full[name]
        assert isinstance(whole, torch.Tensor)
        expected = QuantizedMatrix.empty(whole.shape, matrix.bits).copy_(whole)
        assert torch.equal(matrix.codes, expected.codes)
        assert torch.equal(matrix.scales, expected.scales)
        assert matrix.bits == (8 if name in ("embed_tokens.weight", "lm_head.weight") else int(quantization[3:]))


@formats
def test_the_bytes_that_are_planned_for(quantization: str) -> None:
    source = open_model(LoadConfig())
    model = empty(source.config, torch.bfloat16)
    plain = sum(w.numel() * 2 for w in model.weights().values())
    assert weight_bytes(Shard(ParallelPlan(), source.config), 2, None) == plain
    model.quantize(quantization)
    held = 0
    for w in model.weights().values():
        parts = (w.codes, w.scales) if isinstance(w, QuantizedMatrix) else (w,)
        held += sum(part.numel() * (1 if part.dtype in (torch.int8, torch.uint8) else 2) for part in parts)
    planned = weight_bytes(Shard(ParallelPlan(), source.config), 2, quantization)
    assert abs(planned - held) <= 0.01 * held
    assert held < 0.6 * plain


@NEEDS_COMPILER
@formats
def test_the_engine_gives_the_same_tokens_in_c_and_in_torch(
    quantization: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = ["Once upon a time", "The capital of France is"]
    with LLM(quantization=quantization, dtype="float32", threads=1) as llm:
        assert llm.describe()["quantization"] == quantization
        assert llm.describe()["decode_kernels"].startswith("C (")
        together = [out.token_ids for out in llm.generate(prompts, GREEDY)]
        assert [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts] == together
    with (
        patch.object(startup, "why_not_native", lambda *_: "switched off by a test"),
        LLM(quantization=quantization, dtype="float32", threads=1) as llm,
    ):
        assert "torch decodes, and widens all quantized weights in each step" in caplog.text
        assert [out.token_ids for out in llm.generate(prompts, GREEDY)] == together


def test_verify_says_what_few_bits_cost() -> None:
    """Of the built-in model; 8 bits cost next to nothing, 4 bits more."""
    result = CliRunner().invoke(main, ["verify", "--quantization", "int8", "--json", "--threads", "1"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tokens"] > 200
    assert report["agreement"] > 0.97
    assert abs(report["perplexity"] / report["full_perplexity"] - 1) < 0.01
    coarse = measure(None, "int4", threads=1)
    assert report["agreement"] > coarse.agreement > 0.7
    assert coarse.full_perplexity == pytest.approx(report["full_perplexity"])
    with pytest.raises(RequestError, match="no second token to predict"):
        measure(None, "int8", [""])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 2}, "quantization='int8' needs one process, not 2 ranks"),
        ({"expert_backend": "reference"}, "quantization='int8' does not work with expert_backend='reference'; use cpu"),
        ({"quantization": "int3"}, "quantization='int3' is not one of int8, int4"),
    ],
)
def test_what_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(**{"device": "cpu", "quantization": "int8", **options})


def test_a_gpu_is_refused_by_name() -> None:
    options = EngineConfig.from_options({"quantization": "int4"})
    with pytest.raises(ConfigError, match="works on a CPU only, not on device='cuda:0'; use device=cpu"):
        startup._check_quantization(options, torch.device("cuda:0"), "triton")
