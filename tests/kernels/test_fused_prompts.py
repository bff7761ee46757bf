"""Prompts in the Triton kernels against the decoder in torch: every stage, every family, spans of all kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe.config.model import LayerConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.engine.batch import build_batch
from flexmoe.engine.prompt_graphs import form_of
from flexmoe.engine.prompt_rows import lay_out, pack
from flexmoe.kernels.prefill_attention import Spans
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models import fused_prompts
from flexmoe.models.decoder import Decoder
from flexmoe.models.fused_prompts import PromptDecoder, PromptLayer
from flexmoe.scheduling.step import ScheduledChunk, Step
from tests.cpu.paging import scattered, slot
from tests.cpu.tiny_decoders import CPU, Recording, config, copy_cache, decoder
from tests.cpu.tiny_models import CASES
from tests.kernels.support import DEVICE, ON_GPU, distance
from tests.kernels.test_fused_decoder import assert_stage, load, moved, on_device

# The interpreter computes what is masked, too: the softmax of a row that is not there.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

BLOCK_SIZE = 4
SPANS = ((0, 11), (5, 3), (9, 1), (2, 14))  # of each request: tokens before, and in the step


def chunks_of(spans: Sequence[tuple[int, int]], vocab: int) -> tuple[list[ScheduledChunk], int]:
    """All but the last one sample."""
    requests, num_blocks = scattered([before + count for before, count in spans], BLOCK_SIZE, vocab)
    last = len(spans) - 1
    made = [
        ScheduledChunk(request, before, count, index < max(1, last))
        for index, (request, (before, count)) in enumerate(zip(requests, spans, strict=True))
    ]
    return made, num_blocks


def filled(model: Decoder, chunks: Sequence[ScheduledChunk], num_blocks: int) -> KVCache:
    """Random keys and values where the chunks look back to, NaN elsewhere."""
    cache = KVCache(model.config, num_blocks, BLOCK_SIZE, torch.float32, CPU)
    for layer in cache.layers:
        layer.fill_(torch.nan)
        for chunk in chunks:
            places = [slot(chunk.request, position, BLOCK_SIZE) for position in range(chunk.start)]
            layer[places] = torch.randn(len(places), *layer.shape[1:])
    return cache


@torch.inference_mode()
def check(model: Decoder, spans: Sequence[tuple[int, int]] = SPANS, made: Decoder | None = None) -> None:
    chunks, num_blocks = chunks_of(spans, model.config.vocab_size)
    exact = filled(model, chunks, num_blocks)
    cache, before = moved(exact), copy_cache(exact, torch.float32)
    wanted, seen = Recording(), Recording()
    windows = sorted({layer.window for layer in model.config.layers}, key=lambda w: w or 0)
    batch = build_batch(Step(chunks, 0, []), BLOCK_SIZE, windows, CPU, wanted)
    expected = model.logits(model(batch, exact), batch)
    prompts = PromptDecoder(made or on_device(model), 64, DEVICE)
    found = prompts.logits(lay_out(chunks, BLOCK_SIZE, prompts.block_rows, DEVICE), cache, seen)
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    assert set(seen.stages) == set(wanted.stages)
    for key, stage in wanted.stages.items():
        assert_stage(key, seen.stages[key].cpu(), stage, wanted.stages)
    check_cache(chunks, cache, before, exact)


def check_cache(chunks: Sequence[ScheduledChunk], cache: KVCache, before: KVCache, exact: KVCache) -> None:
    """Only the chunks' own places were written, and rightly."""
    new = [slot(c.request, p, BLOCK_SIZE) for c in chunks for p in range(c.start, c.start + c.num_tokens)]
    for ours, theirs, old in zip(cache.layers, exact.layers, before.layers, strict=True):
        assert distance(ours.cpu()[new], theirs[new]) < 1e-5
        expected = old.cpu()
        expected[new] = ours.cpu()[new]
        assert torch.equal(ours.cpu().view(torch.uint8), expected.view(torch.uint8)), (
            "a slot of another token was written"
        )


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen2_moe"])
@torch.inference_mode()
def test_padding_changes_nothing(case: str) -> None:
    """Rows that belong to nobody choose no expert, write nothing, and leave the others' logits alone."""
    model = load(case)
    chunks, num_blocks = chunks_of(((3, 5), (0, 6), (7, 1)), model.config.vocab_size)
    cache = moved(filled(model, chunks, num_blocks))
    padded = copy_cache(cache, torch.float32)
    prompts = PromptDecoder(on_device(model), 64, DEVICE)
    expected = prompts.logits(lay_out(chunks, BLOCK_SIZE, prompts.block_rows, DEVICE), cache)
    form = form_of(chunks, prompts.block_rows)
    assert form is not None
    assert form.rows > sum(chunk.num_tokens for chunk in chunks)
    flat = torch.from_numpy(pack(chunks, form, prompts.block_rows)).to(DEVICE)
    seen = Recording()
    found = prompts.logits(form.rows_of(flat, prompts.block_rows, BLOCK_SIZE), padded, seen)
    assert distance(found[: len(expected)], expected) < 1e-5
    for ours, theirs in zip(padded.layers, cache.layers, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert distance(ours.nan_to_num(), theirs.nan_to_num()) < 1e-5
    choices = [stage for (name, _), stage in seen.stages.items() if name == "topk_ids"]
    assert choices
    assert all((ids[12:] == -1).all() and (ids[:12] >= 0).all() for ids in choices)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
@torch.inference_mode()
def test_the_first_layer_of_a_graph_in_two_products(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries apart from keys and values, with biases and without: the same logits, keys and values."""
    model = load(case)
    chunks, num_blocks = chunks_of(SPANS, model.config.vocab_size)
    caches = [moved(filled(model, chunks, num_blocks))]
    caches.append(copy_cache(caches[0], torch.float32))
    prompts, linear, outs = PromptDecoder(on_device(model), 64, DEVICE), fused_prompts._linear, []
    form = form_of(chunks, prompts.block_rows)
    assert form is not None
    flat = torch.from_numpy(pack(chunks, form, prompts.block_rows)).to(DEVICE)
    rows = form.rows_of(flat, prompts.block_rows, BLOCK_SIZE)

    def counted(x: Tensor, weight: Tensor, added: Tensor | None, out: Tensor) -> None:
        outs.append(out.shape)
        linear(x, weight, added, out)

    whole = prompts.logits(rows, caches[0], Recording())
    monkeypatch.setattr(fused_prompts, "_linear", counted)
    monkeypatch.setattr(fused_prompts, "_PLAIN_PRODUCT", form.rows - 1)
    parts = prompts.logits(rows, caches[1], Recording())
    assert len(outs) == 2
    assert distance(parts, whole) < 1e-5
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert distance(ours.nan_to_num(), theirs.nan_to_num()) < 1e-5
    prompts.logits(lay_out(chunks, BLOCK_SIZE, prompts.block_rows, DEVICE), caches[1], Recording())
    assert len(outs) == 2  # no graph


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
@torch.inference_mode()
def test_rows_that_nobody_samples_leave_keys_and_values_of_the_last_layer(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are no queries; logits, of three rows among many, are as if all had gone on."""
    model = load(case)
    chunks, num_blocks = chunks_of(SPANS, model.config.vocab_size)
    cache = moved(filled(model, chunks, num_blocks))
    cut = copy_cache(cache, torch.float32)
    fed, attended = [], []
    feed, attend = PromptLayer.feed, fused_prompts.prefill_attention

    def counted(self: PromptLayer, x: Tensor, *others: Any) -> Tensor:
        fed.append(len(x))
        return feed(self, x, *others)

    def noted(query: Tensor, cache: Tensor, spans: Spans, out: Tensor, **others: Any) -> None:
        attended.append(len(spans.blocks))
        attend(query, cache, spans, out, **others)

    monkeypatch.setattr(PromptLayer, "feed", counted)
    monkeypatch.setattr(fused_prompts, "prefill_attention", noted)
    made = on_device(model)
    whole, prompts = PromptDecoder(made, 64, DEVICE, whole=True), PromptDecoder(made, 64, DEVICE)
    rows = lay_out(chunks, BLOCK_SIZE, prompts.block_rows, DEVICE)
    expected, found = whole.logits(rows, cache), prompts.logits(rows, cut)
    layers = model.config.num_layers
    assert fed == [29] * layers + [29] * (layers - 1) + [4]  # a power of two
    assert attended == [4] * layers + [4] * (layers - 1) + [3]
    assert found.shape == expected.shape == (3, model.config.vocab_size)
    assert distance(found, expected) < 1e-5
    for ours, theirs in zip(cut.layers, cache.layers, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert distance(ours.nan_to_num(), theirs.nan_to_num()) < 1e-5


@torch.inference_mode()
def test_a_step_that_samples_nothing_leaves_keys_and_no_logits() -> None:
    model = load("mixtral")
    (chunk, *_), num_blocks = chunks_of(((0, 9),), model.config.vocab_size)
    cache = moved(filled(model, [chunk], num_blocks))
    before, exact = copy_cache(cache, torch.float32), filled(model, [chunk], num_blocks)
    step = [replace(chunk, samples=False)]
    prompts = PromptDecoder(on_device(model), 64, DEVICE)
    logits = prompts.logits(lay_out(step, BLOCK_SIZE, prompts.block_rows, DEVICE), cache)
    assert logits.shape == (0, model.config.vocab_size)
    batch = build_batch(Step([chunk], 0, []), BLOCK_SIZE, [None], CPU, None)
    model(batch, exact)
    check_cache([chunk], cache, before, exact)


@pytest.mark.parametrize("case", sorted(CASES) if ON_GPU else ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_every_family_agrees_stage_by_stage(case: str) -> None:
    check(load(case), ((3, 5), (0, 6)))


@pytest.mark.parametrize("spans", [((0, 1),), ((0, 37),), SPANS])
def test_spans_of_all_kinds(spans: Sequence[tuple[int, int]]) -> None:
    check(decoder(config()), spans)


def test_windows_and_tied_embeddings() -> None:
    layers = (LayerConfig(is_moe=True, window=3), LayerConfig(is_moe=False))
    check(decoder(config(layers=layers, tie_embeddings=True)))


def test_replicas_and_slots_out_of_order() -> None:
    from tests.cpu.tiny_decoders import placed

    made = config(layers=(LayerConfig(is_moe=True), LayerConfig(is_moe=True)))
    assert made.moe is not None
    experts = made.moe.num_experts
    model = decoder(made)
    slots = (*reversed(range(experts)), 0, 1)
    plan: ParallelPlan = placed(experts, slots)
    other = Decoder(made, plan, "reference", 64, dtype=torch.float32, device=DEVICE).eval()
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in other.named_parameters():
        given = weights[name].to(DEVICE)
        parameter.data.copy_(given[list(slots)] if ".experts." in name else given)
    other.pack(in_place=True)
    check(model, made=other)
