"""Router: softmax over all experts, the K best, ties to the lower id, all in fp32; against plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.config.model import MoEConfig
from flexmoe.moe.router import Router, softmax_topk

CPU = torch.device("cpu")


def naive(logits: list[float], top_k: int, renormalize: bool) -> tuple[list[int], list[float]]:
    """One token in fp64: sort by probability, then by id."""
    powers = [math.exp(x - max(logits)) for x in logits]
    chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]
    total = sum(powers[e] for e in chosen) if renormalize else sum(powers)
    return chosen, [powers[e] / total for e in chosen]


def make(num_experts: int, top_k: int, renormalize: bool = False, hidden: int = 16) -> Router:
    router = Router(hidden, MoEConfig(num_experts, top_k, 8, renormalize), device=CPU)
    router.weight.data.normal_()
    return router


@st.composite
def rows_with_ties(draw: Any) -> tuple[list[list[float]], int]:
    """Logits of few different values, so that most of them are shared by several experts."""
    num_experts = draw(st.integers(1, 70))
    value = st.sampled_from([-30.0, -2.0, 0.0, 0.5, 1.0, 3.0])
    rows = draw(st.lists(st.lists(value, min_size=num_experts, max_size=num_experts), min_size=1, max_size=5))
    return rows, draw(st.integers(1, num_experts))


@given(rows_with_ties(), st.booleans())
def test_against_plain_python_with_ties(case: tuple[list[list[float]], int], renormalize: bool) -> None:
    rows, top_k = case
    ids, weights = softmax_topk(torch.tensor(rows), top_k, renormalize)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    for row, logits in enumerate(rows):
        wanted_ids, wanted = naive(logits, top_k, renormalize)
        assert ids[row].tolist() == wanted_ids
        torch.testing.assert_close(weights[row], torch.tensor(wanted), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("num_experts", [8, 64, 256])
def test_all_equal_goes_to_the_lowest_ids(num_experts: int) -> None:
    ids, weights = softmax_topk(torch.zeros(3, num_experts), 4, renormalize=False)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weights, torch.full((3, 4), 1 / num_experts))


@pytest.mark.parametrize("renormalize", [True, False])
def test_as_transformers_routes(renormalize: bool) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(hidden_size=16, num_experts=12, num_experts_per_tok=3, norm_topk_prob=renormalize)
    theirs = Qwen3MoeTopKRouter(config)
    router = make(12, 3, renormalize)
    theirs.weight.data.copy_(router.weight.data)
    x = torch.randn(50, 16)
    _, wanted, wanted_ids = theirs(x)
    ids, weights = router(x)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renormalize", [True, False])
def test_fp32_whatever_the_models_dtype(dtype: torch.dtype, renormalize: bool) -> None:
    """Experts closer than 16 bits can tell apart still come in the right order, with fp32 weights."""
    router = make(40, 40, renormalize, hidden=2)
    router.weight.data[:, 0] = 100.0
    router.weight.data[:, 1] = torch.randperm(40) * 1e-3
    x = torch.ones(2, 2, dtype=dtype)
    ids, weights = router(x)
    wanted_ids, wanted = naive((router.weight.double().sum(1)).tolist(), 40, renormalize)
    assert router.weight.dtype is torch.float32
    assert ids.tolist() == [wanted_ids] * 2
    assert weights.dtype is torch.float32
    torch.testing.assert_close(weights, torch.tensor([wanted] * 2), rtol=1e-4, atol=0)
    assert len(set(weights[0].tolist())) == 40


def test_renormalised_weights_sum_to_1_and_others_do_not() -> None:
    logits = torch.randn(20, 9)
    _, whole = softmax_topk(logits, 3, renormalize=True)
    _, part = softmax_topk(logits, 3, renormalize=False)
    torch.testing.assert_close(whole.sum(1), torch.ones(20))
    assert (part.sum(1) < 0.99).all()
    torch.testing.assert_close(part / part.sum(1, keepdim=True), whole)
