"""Sampler: the sets and probabilities of transformers, reproducible draws, exact greedy, raw log-probabilities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList
from transformers import generation as hf

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.sampler import NO_TOKEN, Sampler, adjust, token_weights
from flexmoe.engine.sampling_state import SamplingState

V = 300
PROMPT = [5, 6, 7, 7, 250]
OUTPUT = [7, 9, 9, 9]


def logits_of(seed: int, rows: int = 4, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def state_of(options: dict[str, Any], seed: int = 0, output: Sequence[int] = ()) -> SamplingState:
    state = SamplingState(SamplingParams.from_options(options), seed, PROMPT, eos_token_ids=[2])
    for token in output:
        state.accept(token)
    return state


def pick(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
    return Sampler().sample(logits, states).token_ids


# ------------------------------------------------------------------------------------------- as transformers does it


def hf_scores(options: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Logits after transformers' processors, in the order that `generate` builds them."""
    steps = LogitsProcessorList()
    if bias := options.get("logit_bias"):
        steps.append(hf.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
    if penalty := options.get("repetition_penalty"):
        steps.append(hf.RepetitionPenaltyLogitsProcessor(penalty))
    if least := options.get("min_tokens"):
        steps.append(hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), least, [2]))
    if temperature := options.get("temperature"):
        steps.append(hf.TemperatureLogitsWarper(temperature))
    if top_k := options.get("top_k"):
        steps.append(hf.TopKLogitsWarper(top_k))
    if top_p := options.get("top_p"):
        steps.append(hf.TopPLogitsWarper(top_p))
    if min_p := options.get("min_p"):
        steps.append(hf.MinPLogitsWarper(min_p))
    ids = torch.tensor([PROMPT + OUTPUT] * len(logits))
    return steps(ids, logits.clone())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.9},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.999},
        {"temperature": 5.0, "top_p": 0.98},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 200, "top_p": 0.99, "temperature": 3.0},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"logit_bias": {3: 4.0, 250: -100.0, 9: 1.0}},
        {"min_tokens": 5},
        {"min_tokens": 4},
        {"repetition_penalty": 1.2, "logit_bias": {7: 3.0, 2: 30.0}, "min_tokens": 9, "top_k": 20, "temperature": 0.6},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_same_tokens_and_probabilities(options: dict[str, Any], seed: int) -> None:
    logits = logits_of(seed)
    states = [state_of(options, output=OUTPUT) for _ in logits]
    weights = token_weights(adjust(logits, states), states)
    expected = torch.softmax(hf_scores(options, logits), dim=-1)
    assert torch.equal(weights > 0, expected > 0)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"presence_penalty": 0.7}, {"frequency_penalty": -0.4}, {"frequency_penalty": 2.0}]
)
def test_presence_and_frequency(options: dict[str, Any]) -> None:
    """OpenAI's formula: only the output counts, not the prompt."""
    logits = logits_of(1)
    work = adjust(logits, [state_of(options, output=OUTPUT) for _ in logits])
    for token, count in ((7, 1), (9, 3)):
        logits[:, token] -= options.get("presence_penalty", 0) + count * options.get("frequency_penalty", 0)
    torch.testing.assert_close(work, logits)


def test_rows_with_different_parameters() -> None:
    mixed: list[dict[str, Any]] = [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"top_k": 9, "top_p": 0.7, "temperature": 2.0},
    ]
    logits = logits_of(2, rows=len(mixed))
    states = [state_of(options, output=OUTPUT) for options in mixed]
    weights = token_weights(adjust(logits, states), states)
    for row, options in enumerate(mixed):
        expected = torch.softmax(hf_scores(options, logits[row : row + 1]), dim=-1)[0]
        torch.testing.assert_close(weights[row] / weights[row].sum(), expected, rtol=1e-4, atol=1e-7)


def test_equally_likely_tokens_stay_or_go_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for options, kept in (({"top_k": 2}, 4), ({"top_p": 0.5}, 4), ({"min_p": 0.36}, 4), ({"top_p": 0.4}, 1)):
        assert int((token_weights(logits, [state_of(options)]) > 0).sum()) == kept, options


def test_flat_distributions_need_more_than_the_shortlist() -> None:
    logits = logits_of(3, rows=1, scale=0.01).repeat(1, 10)
    weights = token_weights(logits, [state_of({"top_p": 0.9})])
    total = float(weights.sum() / torch.exp(logits - logits.max()).sum())
    assert 0.9 <= total < 0.91


# ------------------------------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0, "logprobs": 1}, {"top_k": 1}])
def test_greedy_takes_the_lowest_of_equal_ids(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits = torch.zeros(3, V, dtype=dtype)
    logits[0, [40, 17, 200]] = 1
    logits[1, 299] = 1
    tokens = pick(logits, [state_of(options) for _ in range(3)])
    if "temperature" in options:
        assert tokens == [17, 299, 0]
    else:
        assert tokens[0] in (17, 40, 200)
        assert tokens[1] == 299


def test_greedy_with_penalties_and_suppression() -> None:
    logits = torch.zeros(1, V)
    logits[0, 2], logits[0, 9], logits[0, 30] = 3, 2, 1.5
    assert pick(logits, [state_of({"temperature": 0})]) == [2]
    assert pick(logits, [state_of({"temperature": 0, "min_tokens": 1})]) == [9]
    assert pick(logits, [state_of({"temperature": 0, "min_tokens": 5, "frequency_penalty": 0.3}, output=OUTPUT)]) == [
        30
    ]
    assert pick(logits, [state_of({"temperature": 0, "logit_bias": {77: 4}})]) == [77]


def test_logits_are_left_alone() -> None:
    logits = logits_of(0)
    before = logits.clone()
    options = {"repetition_penalty": 2.0, "logit_bias": {1: 5}, "min_tokens": 3, "logprobs": 2, "top_p": 0.5}
    Sampler().sample(logits, [state_of(options) for _ in logits])
    Sampler().sample(logits, [state_of({**options, "temperature": 0, "top_p": 1.0}) for _ in logits])
    assert torch.equal(logits, before)


# ------------------------------------------------------------------------------------------------------------- draws


def generate(options: dict[str, Any], seed: int, steps: int, companions: int = 0, row: int = 0) -> list[int]:
    """Tokens of one request whose logits depend on its own position only, at any place in a batch."""
    state = state_of(options, seed)
    others = [state_of({"temperature": 0.1 * i, "top_k": i}, seed=99 + i) for i in range(companions)]
    tokens = []
    for step in range(steps):
        own = logits_of(1000 + step, rows=1)
        noise = logits_of(step, rows=companions)
        batch = torch.cat([noise[:row], own, noise[row:]])
        token = pick(batch, [*others[:row], state, *others[row:]])[row]
        state.accept(token)
        for other in others:
            other.accept(1)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 0.8}, {"top_k": 20, "repetition_penalty": 1.2}])
def test_a_seed_gives_the_same_tokens_in_any_batch(options: dict[str, Any]) -> None:
    alone = generate(options, seed=42, steps=24)
    assert alone == generate(options, seed=42, steps=24, companions=7, row=3)
    assert alone == generate(options, seed=42, steps=24, companions=2, row=2)
    assert alone != generate(options, seed=43, steps=24)


def test_preemption_changes_nothing() -> None:
    """A step computed twice, its first token dropped, gives the same token again."""
    state = state_of({}, seed=5)
    logits = logits_of(0, rows=1)
    assert pick(logits, [state]) == pick(logits, [state])


@pytest.mark.parametrize(
    ("options", "kept"), [({}, 12), ({"temperature": 0.5}, 12), ({"top_k": 5}, 5), ({"top_p": 0.8}, None)]
)
def test_distribution(options: dict[str, Any], kept: int | None) -> None:
    """Chi-square of 60,000 draws with a fixed seed against the probabilities, at p = 0.001."""
    draws = 60_000
    logits = torch.tensor([[0.3, 1.2, -0.5, 2.0, 0.0, 0.9, -1.0, 1.5, 0.1, -0.2, 0.6, 1.1]])
    work = logits.expand(draws, -1)
    tokens = pick(work, [state_of(options, seed=seed) for seed in range(draws)])
    weights = token_weights(logits, [state_of(options)])[0]
    expected = (weights / weights.sum() * draws).double()
    alive = expected > 0
    assert kept is None or int(alive.sum()) == kept
    counts = torch.bincount(torch.tensor(tokens), minlength=12).double()
    assert counts[~alive].sum() == 0
    chi = float(((counts - expected)[alive] ** 2 / expected[alive]).sum())
    degrees = int(alive.sum()) - 1
    assert chi < degrees + 3.1 * math.sqrt(2 * degrees) + 4


def test_one_request_draws_independently_over_time() -> None:
    state = state_of({}, seed=11)
    logits = torch.zeros(1, 2)
    tokens = []
    for _ in range(4000):
        tokens.append(pick(logits, [state])[0])
        state.accept(tokens[-1])
    assert abs(sum(tokens) - 2000) < 110
    changes = sum(a != b for a, b in itertools.pairwise(tokens))
    assert abs(changes - 2000) < 110


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-300])
def test_cold_is_greedy(temperature: float) -> None:
    logits = logits_of(4)
    assert pick(logits, [state_of({"temperature": temperature}) for _ in logits]) == logits.argmax(-1).tolist()


def test_tokens_of_no_probability_never_come() -> None:
    logits = torch.full((500, 64), -math.inf)
    logits[:, 63] = 0.0
    assert set(pick(logits, [state_of({}, seed=seed) for seed in range(500)])) == {63}


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    logits = torch.zeros(2, V)
    logits[1] = bad
    for other in ({"top_k": 3}, {"logprobs": 2}):
        chosen = pick(logits, [state_of({}), state_of(other)])
        assert chosen[0] >= 0
        assert chosen[1] == NO_TOKEN


# ---------------------------------------------------------------------------------------------------------- logprobs


def test_logprobs_are_of_the_raw_model() -> None:
    logits = logits_of(7).bfloat16()
    options = {"temperature": 0.3, "repetition_penalty": 1.7, "logit_bias": {4: 50.0}, "logprobs": 3}
    states = [state_of(options), state_of({"temperature": 0}), state_of({**options, "logprobs": 0}), state_of({})]
    result = Sampler().sample(logits, states)
    raw = torch.log_softmax(logits.float(), dim=-1)
    assert [entry is None for entry in result.logprobs] == [False, True, False, True]
    first, third = result.logprobs[0], result.logprobs[2]
    assert first is not None
    assert third is not None
    assert first.token_id == third.token_id == 4
    assert first.logprob == pytest.approx(raw[0, 4].item())
    assert first.rank == 1 + int((raw[0] > raw[0, 4]).sum())
    values, ids = torch.sort(raw[0], descending=True, stable=True)
    assert first.top == tuple(zip(ids[:3].tolist(), values[:3].tolist(), strict=True))
    assert third.top == ()


def test_logprobs_of_equally_likely_tokens() -> None:
    logits = torch.zeros(2, 40)
    logits[0, [30, 20, 10]] = 1.0
    result = Sampler().sample(logits, [state_of({"temperature": 0, "logprobs": n}) for n in (2, 20)])
    first, second = result.logprobs
    assert first is not None
    assert second is not None
    assert ([token for token, _ in first.top], first.rank) == ([10, 20], 1)
    assert ([token for token, _ in second.top], second.rank) == (list(range(20)), 1)


def test_an_empty_batch() -> None:
    assert Sampler().sample(torch.zeros(0, V), []).token_ids == []
