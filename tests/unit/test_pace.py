"""How many tokens a step computes: the roofline's budget, and what prompts get beside answers that are watched.

The real scheduler runs on a virtual clock: a device whose steps take as long as a formula says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.models.presets import PRESETS
from flexmoe.scheduling import BlockManager, Request, RequestStatus, Scheduler, Step, StepTokens
from flexmoe.scheduling.pace import Pace
from flexmoe.scheduling.roofline import balance_point, flops_per_byte, parameters_read, step_tokens

# ------------------------------------------------------------------------------------------------ roofline


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b"])
@pytest.mark.parametrize("balance", [10.0, 200.0, 400.0])
def test_at_the_balance_point_products_take_as_long_as_reading(name: str, balance: float) -> None:
    config = PRESETS[name].config
    tokens = balance_point(config, balance, 2)
    multiplied = config.num_active_parameters() - config.vocab_size * config.hidden_size

    def products_over_reading(count: int) -> float:
        return 2 * count * multiplied / (balance * 2 * parameters_read(config, count))

    assert products_over_reading(tokens) >= 1 > products_over_reading(tokens - 1)


def test_one_token_reads_what_it_multiplies_by_and_many_read_all() -> None:
    config = PRESETS["qwen3-30b-a3b"].config
    table = config.vocab_size * config.hidden_size
    assert parameters_read(config, 1) == pytest.approx(config.num_active_parameters() - table)
    assert parameters_read(config, 10_000) == pytest.approx(config.num_parameters() - 2 * table)


def test_sparse_models_get_larger_steps_and_a_cpu_small_ones() -> None:
    most = {name: step_tokens(preset.config, 2, "cuda", "NVIDIA H200") for name, preset in PRESETS.items()}
    assert most["mixtral-8x7b"] == StepTokens(2304, 384, 8192)
    assert most["qwen3-30b-a3b"].most > most["olmoe-1b-7b"].most > most["mixtral-8x7b"].most
    assert step_tokens(PRESETS["mixtral-8x7b"].config, 4, "cpu") == StepTokens(2048, 64)


def test_cards_are_told_apart_by_whole_words() -> None:
    assert flops_per_byte("cuda", "NVIDIA H100 80GB HBM3") == 295
    assert flops_per_byte("cuda", "NVIDIA A100-SXM4-80GB") == 156
    assert flops_per_byte("cuda", "NVIDIA L40S") == 419
    assert flops_per_byte("cuda", "NVIDIA L4") == 403
    assert flops_per_byte("cuda", "Somebody's X4") == flops_per_byte("cuda") == 200


# ------------------------------------------------------------------------------------------------ what times allow

TOKENS = StepTokens(most=2304, least=384)


def test_nothing_is_known_at_first_and_the_least_is_allowed() -> None:
    assert Pace(TOKENS, 2.0).limit(8) == 384


def test_the_largest_size_within_the_bound_is_found_and_changes_are_followed() -> None:
    pace = Pace(TOKENS, 2.0)
    for _ in range(9):
        pace.observe(32, 0, 0.020)
    for _ in range(20):
        size = pace.limit(32)
        pace.observe(32, size, 0.020 + max(0.015, size * 25e-6))
    assert size == 768  # of 384, 576, 768, 1152 ...: 19 ms; the next one takes 29
    for _ in range(20):
        size = pace.limit(32)
        pace.observe(32, size, 0.020 + max(0.015, size * 30e-6))
    assert size == 576
    for _ in range(9):
        pace.observe(32, 0, 0.060)
    assert pace.limit(32) > 576


def test_one_slow_step_changes_nothing() -> None:
    pace = Pace(TOKENS, 2.0)
    for seconds in (3.0, 0.020, 0.020):
        pace.observe(32, 0, seconds)
    pace.observe(32, 576, 0.038)
    pace.observe(32, 1152, 0.060)
    assert pace.limit(32) == 768


def test_the_tail_of_a_prompt_is_no_example_of_a_chunk() -> None:
    pace = Pace(TOKENS, 2.0)
    pace.observe(32, 0, 0.020)
    pace.observe(32, 384, 0.050)
    for _ in range(9):
        pace.observe(32, 20, 0.021)
    assert pace.limit(32) == 384
    pace.observe(0, 2304, 0.015)  # prompts alone count in full
    assert pace.limit(32) == 2304


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9000), st.floats(0, 10)), max_size=60),
    st.integers(1, 9000),
    st.integers(1, 2000),
    st.integers(1, 300),
)
def test_what_is_allowed_lies_between_least_and_most(
    seen: list[tuple[int, int, float]], most: int, least: int, count: int
) -> None:
    tokens = StepTokens(most, min(least, most))
    pace = Pace(tokens, 2.0)
    for decodes, prompt_tokens, seconds in seen:
        pace.observe(decodes, prompt_tokens, seconds)
    assert tokens.least <= pace.limit(count) <= most


# ------------------------------------------------------------------------------------------------ on a virtual clock

Seconds = Callable[[int, int], float]


@dataclass
class Clocked:
    """A scheduler and a device. seconds: of a step with so many decodes and prompt tokens."""

    scheduler: Scheduler
    seconds: Seconds
    now: float = 0.0
    arrived: dict[Request, float] = field(default_factory=dict)
    tokens_at: dict[Request, list[float]] = field(default_factory=dict)
    longest_wait: float = 0.0

    def add(self, name: str, prompt: int, output: int, *, watched: bool = True) -> Request:
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        request = Request(name, range(prompt), sampling, eos_token_ids=(), max_total_tokens=100_000)
        request.watched = watched
        self.scheduler.add(request)
        self.arrived[request] = self.now
        self.tokens_at[request] = []
        return request

    def step(self) -> Step:
        step = self.scheduler.schedule()
        assert step.chunks
        took = self.seconds(step.num_decodes, step.num_tokens - step.num_decodes)
        self.now += took
        self.scheduler.observe(step, took)
        for chunk in step.chunks:
            if chunk.samples:
                self.tokens_at[chunk.request].append(self.now)
        self.scheduler.update(step, [1] * step.num_samples)
        return step

    def gaps(self, requests: Iterable[Request]) -> np.ndarray:
        return np.concatenate([np.diff(self.tokens_at[request]) for request in requests])


def clocked(
    seconds: Seconds, *, slowdown: float = 2.0, tokens: StepTokens = TOKENS, num_blocks: int = 40_000
) -> Clocked:
    config = SchedulerConfig(max_num_seqs=64, max_decode_slowdown=slowdown)
    return Clocked(Scheduler(config, BlockManager(num_blocks, 16, False), tokens), seconds)


def like_mixtral(decodes: int, prompt_tokens: int) -> float:
    """Two passes over the weights of Mixtral-8x7B: 22.2 ms of decodes; prompts at 740 TFLOP/s or as fast as is read."""
    return (0.0222 if decodes else 0.0) + (max(0.0205, prompt_tokens * 34e-6) if prompt_tokens else 0.0)


@pytest.mark.parametrize("slowdown", [2.0, 3.0])
def test_gaps_keep_their_bound_while_a_long_prompt_arrives_every_second(slowdown: float) -> None:
    device = clocked(like_mixtral, slowdown=slowdown)
    watched = [device.add(f"w{i}", 128, 5000) for i in range(32)]
    prompts: list[Request] = []
    while device.now < 60:
        if device.now > 2 + len(prompts):
            prompts.append(device.add(f"p{len(prompts)}", 4096, 20))
        device.step()
    gaps = device.gaps(watched)
    assert np.percentile(gaps, 99) <= slowdown * 0.0222 + 1e-9
    assert np.percentile(gaps, 50) == pytest.approx(0.0222)
    # Nothing piles up: a prompt has its first token before the next one comes.
    waits = [device.tokens_at[p][0] - device.arrived[p] for p in prompts if device.tokens_at[p]]
    assert len(prompts) - len(waits) <= 1
    assert max(waits) < 1.0


def test_without_a_bound_the_same_gaps_are_as_long_as_the_budget() -> None:
    """What the bound is for; and unwatched answers, of which nobody sees the gaps, get whole steps."""
    device = clocked(like_mixtral)
    unwatched = [device.add(f"w{i}", 128, 300, watched=False) for i in range(32)]
    for _ in range(50):
        device.step()
    device.add("p", 4096, 2)
    sizes = [device.step().num_tokens for _ in range(2)]
    assert sizes == [2304, 4096 - (2304 - 32) + 32]
    assert max(device.gaps(unwatched)) > 4 * 0.0222


def test_prompts_get_whole_steps_when_no_watched_answer_is_being_decoded() -> None:
    device = clocked(like_mixtral)
    device.add("p", 4096, 2)
    assert device.step().num_tokens == 2304
    device.add("q", 4096, 2)
    assert device.step().num_tokens == 2304


def test_steps_are_wider_while_nobody_watches() -> None:
    device = clocked(like_mixtral, tokens=replace(TOKENS, unwatched=8192))
    assert device.scheduler.max_tokens == 8192
    for name in "abc":
        device.add(name, 6000, 2, watched=False)
    assert device.step().num_tokens == 8192
    device.add("w", 100, 2)  # who reads its first token waits for no step of that size, but those on their way
    assert device.step().num_tokens == 2304
    device.scheduler.abort("w")
    assert device.step().num_tokens == 3 * 6000 - 8192 - 2303  # one of the 2,304 was a decode


def test_prompts_advance_on_a_device_where_no_chunk_keeps_the_bound() -> None:
    device = clocked(lambda decodes, tokens: 0.001 * bool(decodes) + 0.1 * bool(tokens) + 0.001 * tokens)
    device.add("w", 8, 1000)
    device.step()
    long = device.add("p", 4000, 2)
    for _ in range(-(-4000 // 384)):
        assert len(device.step().chunks) == 2
    assert long.num_output_tokens == 1


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.tuples(st.integers(1, 600), st.integers(1, 12), st.booleans(), st.integers(0, 5)), min_size=1, max_size=12
    ),
    st.integers(20, 400),
    st.integers(1, 400),
    st.integers(0, 800),
    st.randoms(use_true_random=False),
)
def test_whatever_steps_take_decodes_come_first_and_the_oldest_prompt_advances(
    arrivals: list[tuple[int, int, bool, int]], most: int, least: int, unwatched: int, random: object
) -> None:
    noise = random.random  # type: ignore[attr-defined]
    tokens = StepTokens(most, min(least, most), unwatched)
    device = clocked(lambda decodes, prompts: noise() * (1 + decodes + prompts), tokens=tokens, num_blocks=80)
    coming = list(enumerate(arrivals))
    for _ in range(20_000):
        while coming and coming[0][1][3] <= device.now:
            number, (prompt, output, watched, _) = coming.pop(0)
            device.add(str(number), prompt, output, watched=watched)
        if not device.scheduler.has_unfinished:
            if not coming:
                break
            device.now = max(device.now, float(coming[0][1][3]))
            continue
        alone = not device.scheduler.num_watched
        _check(device.step(), device, replace(tokens, most=tokens.widest) if alone else tokens)
        device.scheduler.check_integrity()
    assert all(request.status is RequestStatus.FINISHED for request in device.arrived)
    assert len(device.arrived) == len(arrivals)


def test_a_newcomer_of_one_token_waits_with_the_decodes() -> None:
    tokens = StepTokens(33, 33)
    device = clocked(lambda decodes, prompts: 0.01 * (1 + decodes + prompts), tokens=tokens, num_blocks=80)
    for number, (prompt, output) in enumerate(((1, 2), (96, 1), (1, 1), (2, 1))):
        device.add(str(number), prompt, output, watched=False)
    while device.scheduler.has_unfinished:
        _check(device.step(), device, tokens)


def _check(step: Step, device: Clocked, tokens: StepTokens) -> None:
    """After a step: it kept to its budget, and to what prompts are owed."""
    assert step.num_tokens <= tokens.most
    prompts = step.chunks[step.num_decodes :]
    owed = min(tokens.least, tokens.most - step.num_decodes)
    given = sum(chunk.num_tokens for chunk in prompts)
    # A prompt of one token, or the last token of one, stands among the decodes.
    given += sum(chunk.start < chunk.request.num_prompt_tokens for chunk in step.chunks[: step.num_decodes])
    # Where decodes wait for prompts, so do newcomers that lack one token, which have had theirs of the budget.
    scheduled = {chunk.request for chunk in step.chunks}
    new = [one for one in device.scheduler._running if one not in scheduled and not one.num_output_tokens]
    given += sum(one.num_computed_tokens == one.num_tokens - 1 for one in new)
    unfinished = [chunk for chunk in prompts if not chunk.samples]
    assert len(unfinished) <= 1
    if unfinished:  # cut short by the budget and by nothing else
        assert given >= owed
