"""Everything at once: requests of every kind come, stream, are aborted and preempted; each gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from flexmoe import LLM, RequestOutput, SamplingParams
from tests.cpu.serving import WAYS, assert_idle, open_llm

CASES = ("mixtral", "mixtral-window", "olmoe", "qwen2_moe-odd", "qwen3_moe-odd", "llama-mha-bias", "mistral-window")
KINDS = (
    SamplingParams(temperature=0, max_tokens=14),
    SamplingParams(seed=3, max_tokens=20, top_p=0.9),
    SamplingParams(seed=1, n=3, max_tokens=9, stop=["a", "e", "th"]),
    SamplingParams(seed=5, max_tokens=None, stop_token_ids=list(range(3, 40)), min_tokens=3, logprobs=1),
    SamplingParams(temperature=0, max_tokens=25, repetition_penalty=1.5, ignore_eos=True),
)
LONGEST = 50  # of the prompts; the contexts have 128 positions

Job = tuple[int, int]  # which prompt, and which of the kinds
Answer = list[tuple[tuple[int, ...], str, str | None, str | int | None]]


def make_prompts(rng: random.Random) -> list[list[int]]:
    """Some of them begin alike."""
    prompts = [[rng.randrange(3, 320) for _ in range(rng.randint(1, LONGEST))] for _ in range(5)]
    return prompts + [prompts[0][:20] + [9] * more for more in (1, 7, 30)]


def open_some(rng: random.Random, way: str) -> LLM:
    """An engine with odd limits, and few blocks more than one request may need."""
    size = rng.choice([1, 3, 4, 16])
    options: dict[str, Any] = {
        "block_size": size,
        "num_blocks": -(-140 // size) + rng.randint(0, 20),
        "max_num_batched_tokens": rng.choice([5, 16, 64, 512]),
        "max_num_seqs": rng.choice([2, 5, 16]),
        "enable_prefix_caching": rng.random() < 0.7,
    }
    return open_llm(rng.choice(CASES), way, **options)


def answer(output: RequestOutput) -> Answer:
    return [(s.token_ids, s.text, s.finish_reason, s.stop_reason) for s in output.outputs]


def assert_begun(output: RequestOutput, expected: Answer) -> None:
    """An aborted request: each sample has the beginning of its tokens, or had finished."""
    for sample, whole in zip(answer(output), expected, strict=True):
        assert sample[0] == whole[0][: len(sample[0])]
        assert sample[2] == "abort" or sample == whole


@pytest.mark.parametrize("seed", range(15))
def test_everything_at_once(seed: int) -> None:
    rng = random.Random(seed)
    everything_at_once(rng, KINDS, rng.choice((*WAYS, "late, mixed")))


@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once_with_prompts_ahead(seed: int) -> None:
    """Some of them cannot be chosen on the device."""
    everything_at_once(random.Random(seed), KINDS, "late, mixed")


def everything_at_once(rng: random.Random, kinds: Sequence[SamplingParams], way: str) -> None:
    prompts = make_prompts(rng)
    with open_some(rng, way) as llm:
        engine = llm.engine
        jobs: list[Job] = rng.sample([(p, k) for p in range(len(prompts)) for k in range(len(kinds))], 14)
        expected = {job: answer(llm.generate([prompts[job[0]]], kinds[job[1]])[0]) for job in jobs}
        running: dict[str, Job] = {}
        waiting = jobs * 2
        rng.shuffle(waiting)
        while waiting or engine.has_unfinished:
            chance = rng.random()
            if waiting and chance < 0.3:
                job = waiting.pop()
                request_id = engine.add_request(prompts[job[0]], kinds[job[1]], stream=rng.random() < 0.5)
                running[request_id] = job
            elif running and chance < 0.36:
                request_id = rng.choice(list(running))
                output = engine.abort(request_id)
                assert output is not None
                assert_begun(output, expected[running.pop(request_id)])
            for output in engine.step():
                if output.finished:
                    assert answer(output) == expected[running.pop(output.request_id)]
            engine.scheduler.check_integrity()
        assert not running
        assert_idle(llm)
