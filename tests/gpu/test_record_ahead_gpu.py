"""Graphs recorded while an engine is idle: later steps use them, and what was in the cache stays there."""

from __future__ import annotations

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.engine.cuda_graph import GraphPool
from tests.cpu.tiny_models import tiny

PROMPTS = [[5, 17, 230, 9, 44], [11] * 3, list(range(3, 40)), [7, 8]]
WAYS = (
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=50, seed=3, max_tokens=12, ignore_eos=True),
)


def make() -> LLM:
    return LLM(str(tiny("olmoe")), dtype="bfloat16", device="cuda", num_blocks=256, max_num_seqs=16)


def answers(llm: LLM) -> list[tuple[int, ...]]:
    return [output.token_ids for params in WAYS for output in llm.generate(PROMPTS, params)]


def test_what_was_recorded_while_idle_is_what_steps_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as llm:
        expected = answers(llm)
    with make() as llm:
        recorded = 0
        while llm.engine.prepare():
            recorded += 1
        assert recorded > 50
        before = torch.cuda.mem_get_info()[0]
        monkeypatch.setattr(GraphPool, "capture", lambda *_: pytest.fail("a graph was recorded during a step"))
        assert answers(llm) == expected
        assert before - torch.cuda.mem_get_info()[0] < 64 << 20


def test_recording_harms_nothing_that_was_computed() -> None:
    prompt = [list(range(3, 75))]
    with make() as llm:
        first = llm.generate(prompt, WAYS[0])[0]
        while llm.engine.prepare():
            pass
        again = llm.generate(prompt, WAYS[0])[0]  # its keys are still in the cache
        assert again.token_ids == first.token_ids
        assert again.metrics.num_cached_tokens > 0
