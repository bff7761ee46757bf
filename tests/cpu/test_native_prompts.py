"""Prompts in the C kernels: near torch, and the same bits in one piece or many, alone or beside others, as decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe.config.model import LayerConfig
from flexmoe.engine.batch import build_batch, build_paged_rows, build_prompt_rows
from flexmoe.kernels.cpu import levels
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.native import takes_prompts
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk, Step
from tests.cpu.nearness import error
from tests.cpu.paging import decode_step, scattered, slot
from tests.cpu.test_native_invariance import CONFIGS, with_threads
from tests.cpu.tiny_decoders import CPU, NEEDS_COMPILER, config, decoder, in_fp32

pytestmark = NEEDS_COMPILER
BLOCK = 4
MOE, DENSE, WINDOW = LayerConfig(is_moe=True), LayerConfig(is_moe=False), LayerConfig(is_moe=False, window=7)
LENGTHS = [37, 1, 90, 4]
levels_here = pytest.mark.parametrize("level", levels.available(), ids=lambda level: level.name)


def prompts(requests: Sequence[Request], starts: Sequence[int] = ()) -> Step:
    """Whole prompts, or what follows the first `starts` tokens of each."""
    begin = starts or [0] * len(requests)
    chunks = [ScheduledChunk(r, s, r.num_tokens - s, True) for r, s in zip(requests, begin, strict=True)]
    return Step(chunks, 0, [])


def poisoned(model: Decoder, num_blocks: int) -> KVCache:
    cache = KVCache(model.config, num_blocks, BLOCK, model.norm.weight.dtype, CPU)
    for layer in cache.layers:
        layer.fill_(float("nan"))
    return cache


@torch.inference_mode()
def by_c(model: Decoder, step: Step, cache: KVCache, most: int | None = None) -> Tensor:
    assert model.native is not None
    return torch.cat([model.native(rows, cache) for rows in build_prompt_rows(step, BLOCK, most)])


@torch.inference_mode()
def by_torch(model: Decoder, step: Step, cache: KVCache) -> Tensor:
    windows = sorted({layer.window for layer in model.config.layers}, key=lambda w: w or 0)
    batch = build_batch(step, BLOCK, windows, CPU)
    return model.logits(model(batch, cache), batch)


def written(cache: KVCache, requests: Sequence[Request]) -> list[Tensor]:
    places = [slot(r, p, BLOCK) for r in requests for p in range(r.num_tokens)]
    return [layer[places] for layer in cache.layers]


@levels_here
@pytest.mark.parametrize("layers", [(MOE, MOE), (DENSE, WINDOW)], ids=["experts", "dense"])
def test_in_fp32_near_torch(level: levels.Level, layers: Any) -> None:
    model = decoder(config({"qk_norm": "head"}, layers=layers), torch.float32, 2, level.name)
    requests, num_blocks = scattered(LENGTHS, BLOCK, 50)
    ours, theirs = poisoned(model, num_blocks), poisoned(model, num_blocks)
    assert error(by_c(model, prompts(requests), ours), by_torch(model, prompts(requests), theirs)) < 1e-5
    for a, b in zip(written(ours, requests), written(theirs, requests), strict=True):
        assert error(a, b) < 1e-5


@levels_here
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_in_bf16_nearer_to_fp32_than_torch(level: levels.Level, quantization: str | None) -> None:
    """Dense layers: with experts, a choice that falls the other way would be all that is seen."""
    model = decoder(config(layers=(DENSE, DENSE)), torch.bfloat16, 2, level.name, quantization)
    requests, num_blocks = scattered(LENGTHS, BLOCK, 50)
    wide = in_fp32(model)
    wanted = by_torch(wide, prompts(requests), poisoned(wide, num_blocks))
    off = error(by_c(model, prompts(requests), poisoned(model, num_blocks)).float(), wanted)
    theirs = error(by_torch(model, prompts(requests), poisoned(model, num_blocks)).float(), wanted)
    assert off < min(theirs, 0.03)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits_in_pieces_alone_and_with_1_to_3_threads(name: str, quantization: str | None) -> None:
    model = decoder(CONFIGS[name], torch.bfloat16, 1, quantization=quantization)
    requests, num_blocks = scattered(LENGTHS, BLOCK, model.config.vocab_size)
    alone = poisoned(model, num_blocks)
    wanted = torch.cat([by_c(model, prompts([r]), alone) for r in requests])
    assert wanted.isfinite().all()
    for threads in (1, 2, 3):
        model.native = with_threads(model, threads)
        for most in (None, 1, 5, 64):
            cache = poisoned(model, num_blocks)
            assert torch.equal(by_c(model, prompts(requests), cache, most), wanted)
            for a, b in zip(written(cache, requests), written(alone, requests), strict=True):
                assert torch.equal(a, b)


@levels_here
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_long_rows_and_many_activations(level: levels.Level, quantization: str | None) -> None:
    """More steps than one in each half of a row, and tiles of every size."""
    changes: dict[str, Any] = {"hidden_size": 203, "dense_width": 140}
    model = decoder(config(**changes, layers=(DENSE, DENSE)), torch.bfloat16, 2, level.name, quantization)
    requests, num_blocks = scattered([107], BLOCK, 50)
    wide = in_fp32(model)
    off = error(
        by_c(model, prompts(requests), poisoned(model, num_blocks)),
        by_torch(wide, prompts(requests), poisoned(wide, num_blocks)),
    )
    assert off < 0.03
    whole = poisoned(model, num_blocks)
    wanted = by_c(model, prompts(requests), whole)
    for most in (1, 7, 20, 33, 58, 90):
        pieces = poisoned(model, num_blocks)
        assert torch.equal(by_c(model, prompts(requests), pieces, most), wanted)
        for a, b in zip(written(pieces, requests), written(whole, requests), strict=True):
            assert torch.equal(a, b)


@levels_here
def test_the_same_bits_behind_a_prefix(level: levels.Level) -> None:
    model = decoder(CONFIGS["odd"], torch.bfloat16, 2, level.name)
    requests, num_blocks = scattered([50, 33], BLOCK, model.config.vocab_size)
    whole, parts = poisoned(model, num_blocks), poisoned(model, num_blocks)
    wanted = by_c(model, prompts(requests), whole)
    first = Step([ScheduledChunk(r, 0, n, False) for r, n in zip(requests, (17, 30), strict=True)], 0, [])
    assert by_c(model, first, parts).shape[0] == 0
    assert torch.equal(by_c(model, prompts(requests, [17, 30]), parts), wanted)


@levels_here
def test_in_fp32_a_prompt_has_the_bits_of_its_decodes(level: levels.Level) -> None:
    model = decoder(CONFIGS["odd"], torch.float32, 2, level.name)
    requests, num_blocks = scattered([23], BLOCK, model.config.vocab_size)
    tokens = list(requests[0].token_ids)
    wanted = by_c(model, prompts(requests), poisoned(model, num_blocks))
    cache = poisoned(model, num_blocks)
    assert model.native is not None
    for count in range(1, 24):
        requests[0].token_ids = tokens[:count]
        logits = model.native(build_paged_rows(decode_step(requests), BLOCK), cache)
    assert torch.equal(logits, wanted)


@levels_here
@pytest.mark.parametrize("window", [3, 40])
def test_far_below_zero_behind_a_window(level: levels.Level, window: int) -> None:
    """Queries turned away from all keys that they see, in blocks of which some rows see none of the first tile."""
    layers = (LayerConfig(is_moe=False, window=window),)
    model = decoder(config({"num_heads": 2, "qk_norm": "head"}, layers=layers), torch.bfloat16, 2, level.name)
    for name, weight in model.weights().items():
        assert isinstance(weight, Tensor)
        if name.endswith("qkv.weight"):
            weight[32:64] = -weight[:32]
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.fill_(30 if "q_norm" in name else 1)
    model.pack(2, isa=level.name)
    requests, num_blocks = scattered([131, 195], BLOCK, 1)
    wide = in_fp32(model)
    whole = by_c(model, prompts(requests), poisoned(model, num_blocks))
    assert error(whole, by_torch(wide, prompts(requests), poisoned(wide, num_blocks))) < 0.03
    for most in (1, 7, 50):
        assert torch.equal(by_c(model, prompts(requests), poisoned(model, num_blocks), most), whole)


def test_tile_units_leave_prompts_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "features", lambda: frozenset({"amx_tile"}))
    assert not takes_prompts(torch.bfloat16, "portable", quantized=True)


def test_who_takes_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 who has bf16 units; of quantized weights everyone."""
    has = levels.features() - {"amx_tile"}
    monkeypatch.setattr(levels, "features", lambda: has)
    for level in levels.available():
        assert takes_prompts(torch.bfloat16, level.name) == (level.name == "avx512_bf16")
        assert not takes_prompts(torch.float32, level.name)
        assert takes_prompts(torch.float32, level.name, quantized=True)
