"""Greedy steps of the C kernels: the largest logit has the bits that a whole head gives, most of which is not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.kernels.cpu import levels
from flexmoe.kernels.cpu.screen import MOST_COLUMNS, Screen
from flexmoe.models.decoder import Decoder
from flexmoe.models.native import NativeDecoder, screen_of
from tests.cpu.paging import scattered
from tests.cpu.tiny_decoders import NEEDS_COMPILER, by_c, config, copy_cache, decoder, filled_cache

DENSE = (LayerConfig(is_moe=False),)
# Rows and columns that fill blocks, cache lines and shares of threads, and others that do not.
SHAPES = {"even": (1024, 64), "odd": (1003, 67), "few": (5, 48), "wide": (777, 390)}
LENGTHS = [1, 5, 2, 7, 3, 1, 4, 9, 2, 6, 1, 8, 3, 2, 5, 1, 7]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def shape(name: str) -> ModelConfig:
    vocab, hidden = SHAPES[name]
    return config(vocab_size=vocab, hidden_size=hidden, layers=DENSE)


class Steps:
    """Decodes of some rows of a model, with all of the head and with what may be the largest."""

    def __init__(self, model: Decoder, dtype: torch.dtype, lengths: list[int]) -> None:
        self.model, self.dtype = model, dtype
        self.requests, blocks = scattered(lengths, 4, model.config.vocab_size)
        self.cache = filled_cache(model.config, self.requests, blocks, 4, dtype)

    def logits(self, count: int, *, best: bool) -> torch.Tensor:
        return by_c(self.model, self.requests[:count], copy_cache(self.cache, self.dtype), best=best)

    def check(self, count: int) -> torch.Tensor:
        """The screened logits of `count` rows, after a look at each: of the whole ones, or certainly smaller."""
        whole, screened = self.logits(count, best=False), self.logits(count, best=True)
        kept = screened > -torch.inf
        assert torch.equal(screened[kept], whole[kept])
        largest = whole.amax(-1, keepdim=True)
        assert kept[whole == largest].all(), "a largest logit is not there"
        return screened


@NEEDS_COMPILER
@dtypes
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("level", levels.available(), ids=lambda level: level.name)
def test_at_each_level(level: levels.Level, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    steps = Steps(decoder(shape(name), dtype, 2, level.name), dtype, LENGTHS)
    kept = [(steps.check(count) > -torch.inf).float().mean() for count in (1, 2, 3, 4, 5, 8, 17)]
    if name != "few":
        assert max(kept) < 0.5, "most of the head is ruled out"


@NEEDS_COMPILER
@dtypes
def test_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    steps = Steps(decoder(shape("odd"), dtype, 1), dtype, LENGTHS)
    found = []
    for threads in (1, 2, 3):
        layers = [layer.native() for layer in steps.model.decoder_layers]
        steps.model.native = NativeDecoder(layers, steps.model._outer_weights(), threads, 64)
        found += [steps.check(6).argmax(-1) for _ in range(20)]
    assert all(torch.equal(tokens, found[0]) for tokens in found)


@NEEDS_COMPILER
def test_equal_logits_stay_equal() -> None:
    """Of equal ones the first counts, so none of them may be lost; nor one that is larger by the last bit."""
    torch.manual_seed(3)
    model = decoder(shape("even"), torch.bfloat16, 2)
    steps = Steps(model, torch.bfloat16, LENGTHS)
    assert model.lm_head is not None
    assert model.lm_head.weight is not None
    head = model.lm_head.weight.data
    best = int(steps.logits(1, best=False)[0].argmax())
    head[[7, 500, 1023]] = head[best].clone()
    head[3] = head[best] * (1 + 2**-7)
    model.pack(2)
    screened, whole = steps.check(1)[0], steps.logits(1, best=False)[0]
    places = [3, 7, best, 500, 1023]
    assert torch.equal(screened[places], whole[places])
    assert screened.argmax() == 3


@NEEDS_COMPILER
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-30, 1e30])
def test_activations_of_every_kind(value: float, dtype: torch.dtype) -> None:
    """What is not a number stays one, and a row of zeros has logits that are all equal."""
    torch.manual_seed(4)
    model = decoder(shape("odd"), dtype, 2)
    model.norm.weight.data.mul_(0 if value == 0 else 1)
    steps = Steps(model, dtype, LENGTHS)
    token = steps.requests[1].token_ids[-1]
    assert model.embed_tokens.weight is not None
    model.embed_tokens.weight.data[token] = value
    whole, screened = steps.logits(3, best=False), steps.logits(3, best=True)
    assert torch.equal(whole.isnan().any(-1), screened.isnan().any(-1))
    assert torch.equal(whole.argmax(-1), screened.argmax(-1))


@NEEDS_COMPILER
@dtypes
def test_weights_of_every_kind(dtype: torch.dtype) -> None:
    """Rows of zeros, of one large weight, and of tiny ones; those are what codes hold worst."""
    torch.manual_seed(5)
    model = decoder(shape("wide"), dtype, 2)
    assert model.lm_head is not None
    assert model.lm_head.weight is not None
    head = model.lm_head.weight.data
    head[0:100] = 0
    head[100:200, 3] = 1e3
    head[200:300] *= 1e-20
    head[300:310] *= 3
    steps = Steps(model, dtype, LENGTHS)
    for _ in range(2):
        model.pack(2)
        for count in (1, 3, 4, 9):
            steps.check(count)
        head *= 1e-25  # all tiny: their squares are below any number of fp32


@NEEDS_COMPILER
@dtypes
@pytest.mark.parametrize(("weights", "activations"), [(1e-18, 1e-23), (1e-38, 1), (1e-40, 1e5), (1e-42, 1e20)])
@pytest.mark.parametrize("name", ["odd", "few"])
def test_numbers_too_small_for_fp32(name: str, weights: float, activations: float, dtype: torch.dtype) -> None:
    """Products that vanish, in some kernels sooner than in others, and weights that do."""
    torch.manual_seed(7)
    for level in levels.available():
        model = decoder(shape(name), dtype, 2, level.name)
        model.norm.weight.data.mul_(activations)
        assert model.lm_head is not None
        assert model.lm_head.weight is not None
        head = model.lm_head.weight.data
        head.copy_((torch.randn(head.shape, dtype=torch.float64) * weights).to(dtype))
        model.pack(2, isa=level.name)
        steps = Steps(model, dtype, LENGTHS)
        for count in (1, 4, 9):
            steps.check(count)


def test_a_head_too_wide_for_sums_of_codes_has_none() -> None:
    assert screen_of(torch.zeros(2, 66311)) is not None
    assert screen_of(torch.zeros(2, 66312)) is None


def test_the_longest_sum_of_codes_fits() -> None:
    """255 times 127 as often as may be, less what the shift takes off."""
    screen = Screen.empty(1, MOST_COLUMNS).fill(torch.ones(1, MOST_COLUMNS))
    assert screen.codes.sum(dtype=torch.int64) * 255 < 2**31
    assert screen.shifts.item() == 128 * 127 * MOST_COLUMNS


@pytest.mark.parametrize("spread", [0.0, 3.0])  # of the sizes of weights and activations
def test_bounds_hold(spread: float) -> None:
    """Products of codes as screen.h forms them, and those of the numbers themselves, in fp64."""
    torch.manual_seed(6)
    for columns in (1, 63, 64, 65, 500):
        head = (torch.randn(300, columns) * torch.exp(spread * torch.randn(300, columns))).bfloat16()
        x = torch.randn(20, columns) * torch.exp(spread * torch.randn(20, columns))
        screen = Screen.empty(*head.shape).fill(head)
        codes = (x / (x.abs().amax(-1, keepdim=True) / 127)).round()
        seen = codes * (x.abs().amax(-1, keepdim=True) / 127)
        about = seen.double() @ (screen.codes[:, :columns] * screen.scales[:, None]).double().T
        lost = torch.linalg.vector_norm(x - seen, dim=-1, keepdim=True)
        bound = screen.slack * torch.linalg.vector_norm(x, dim=-1, keepdim=True) + screen.lengths * lost
        away = (about - x.double() @ head.double().T).abs()
        assert (away <= bound).all()
        assert (screen.codes[:, columns:] == 0).all()
        assert torch.equal(screen.shifts, 128 * screen.codes.sum(-1, dtype=torch.int32))


@NEEDS_COMPILER
def test_heads_in_few_bits_have_none() -> None:
    model = decoder(shape("even"), torch.bfloat16, 2, quantization="int8")
    assert model.lm_head is not None
    assert model.lm_head.quantized is not None
    assert screen_of(model.lm_head.quantized) is None
    steps = Steps(model, torch.bfloat16, LENGTHS)
    assert torch.equal(steps.logits(4, best=True), steps.logits(4, best=False))


@NEEDS_COMPILER
def test_the_engine_screens_greedy_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are to be greedy, and nobody asks for more than the token; tokens are the same either way."""
    asked: list[bool] = []
    call = NativeDecoder.__call__

    def spy(self: NativeDecoder, *arguments: Any, best: bool = False) -> torch.Tensor:
        asked.append(best)
        return call(self, *arguments, best=best)

    monkeypatch.setattr(NativeDecoder, "__call__", spy)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    looked = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    drawn = SamplingParams(temperature=0.8, seed=1, max_tokens=12, ignore_eos=True)
    with LLM("builtin", threads=2) as llm:

        def tokens(*params: SamplingParams) -> list[list[int]]:
            asked.clear()
            return [o.token_ids for o in llm.generate(["Once upon a time"] * len(params), list(params))]

        (alone,) = tokens(greedy)
        assert asked[-1]
        assert tokens(looked) == [alone]
        assert not any(asked)
        assert tokens(greedy, drawn)[0] == alone
        assert not any(asked)
