"""DataRanks: each request is on one data rank, the lightest when it came, and its answer is that of one alone."""

from __future__ import annotations

import random

import pytest

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError
from flexmoe.scheduling import BlockManager, DataRanks, Request, RequestStatus, Step, StepTokens
from tests.unit.test_scheduling_properties import answer_alone, next_token

SIZE = 4


def make(ranks: int = 2, blocks: int = 8, budget: int = 16) -> DataRanks:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=budget)
    return DataRanks(config, [BlockManager(blocks, SIZE, True) for _ in range(ranks)])


def request(name: str, tokens: int, new: int = 4) -> Request:
    params = SamplingParams(max_tokens=new)
    return Request(name, [(i % 7) + 1 for i in range(tokens)], params, eos_token_ids=(0,), max_total_tokens=32)


def sampled(step: Step) -> list[int]:
    return [next_token(tuple(chunk.request.token_ids)) for chunk in step.chunks if chunk.samples]


def homes(ranks: DataRanks) -> list[set[str]]:
    """Which requests each data rank computes next."""
    return [{chunk.request.request_id for chunk in part.chunks} for part in ranks.schedule().parts]


def test_a_request_goes_where_the_fewest_tokens_are_outstanding() -> None:
    ranks = make()
    for name, tokens in (("a", 2), ("b", 9), ("c", 1), ("d", 3)):  # 6, 13, 5, 7 tokens at most
        ranks.add(request(name, tokens))
    assert homes(ranks) == [{"a", "c", "d"}, {"b"}]
    assert (ranks.num_running, ranks.num_waiting, ranks.has_unfinished) == (4, 0, True)


def test_one_that_ended_weighs_nothing() -> None:
    ranks = make()
    first, second = request("a", 9), request("b", 2)
    ranks.add(first)
    ranks.add(second)
    assert ranks.abort("a") is first
    assert ranks.abort("a") is None
    ranks.add(request("c", 2))
    assert homes(ranks) == [{"c"}, {"b"}]
    ranks.finish(second, "stop", "x")
    ranks.finish(second, "stop", "y")  # as when a stop string is found in what has just finished
    assert second.stop_reason == "y"
    ranks.check_integrity()
    ranks.abort("c")
    assert not ranks.has_unfinished


def test_an_id_is_taken_on_all_data_ranks() -> None:
    ranks = make()
    ranks.add(request("a", 3))
    with pytest.raises(RequestError, match="request_id='a' is still being served"):
        ranks.add(request("a", 3))


def test_idle_data_ranks_have_an_empty_part() -> None:
    ranks = make(3)
    ranks.add(request("a", 3))
    step = ranks.schedule()
    assert [len(part.chunks) for part in step.parts] == [1, 0, 0]
    assert (step.num_tokens, step.num_samples) == (3, 1)
    with pytest.raises(ValueError, match="2 tokens were sampled for a step that samples 1"):
        ranks.update(step, [1, 2])


def test_the_step_behind_is_that_of_all() -> None:
    ranks = make()
    for name in "ab":
        ranks.add(request(name, 3))
    first = ranks.schedule()
    ahead = ranks.schedule_ahead(first)
    assert ahead is not None
    assert [[chunk.start for chunk in part.chunks] for part in ahead.parts] == [[3], [3]]
    ranks.update(first, [5, 5])
    ranks.add(request("c", 20))  # a prompt of two chunks: its data rank must wait, and so must the other
    ranks.update(ahead, [5, 5])
    assert ranks.schedule_ahead(ranks.schedule()) is None


def test_who_reads_along_on_one_data_rank_makes_steps_of_all_shorter() -> None:
    tokens = StepTokens(most=8, least=4, unwatched=16)
    ranks = DataRanks(SchedulerConfig(max_num_seqs=4), [BlockManager(16, SIZE, False) for _ in range(2)], tokens)
    watched = request("w", 3, new=20)
    watched.watched = True
    ranks.add(request("a", 26))
    ranks.add(watched)
    assert [part.num_tokens for part in ranks.schedule().parts] == [8, 3]
    ranks.abort("w")
    assert [part.num_tokens for part in ranks.schedule().parts] == [16, 0]


def test_random_lives() -> None:
    """Few blocks, so that requests are preempted; some are aborted; prompts begin alike, so that blocks are shared."""
    preempted, cached = 0, 0
    for seed in range(20):
        rng = random.Random(seed)
        ranks, made = make(rng.choice([2, 3]), blocks=8, budget=rng.choice([5, 16])), []
        for number in range(30):
            made.append(request(str(number), rng.randint(1, 14), rng.randint(4, 18)))
            ranks.add(made[-1])
            if rng.random() < 0.1:
                ranks.abort(rng.choice(made).request_id)
            preempted += advance(ranks)
        while ranks.has_unfinished:
            preempted += advance(ranks)
        assert all(r.status is RequestStatus.FINISHED for r in made)
        assert all(r.output_token_ids == answer_alone(r) for r in made if r.finish_reason != "abort")
        assert ranks.blocks.num_free == ranks.blocks.num_blocks == 8 * len(ranks.schedulers)
        assert ranks.blocks.stats.hit_tokens == sum(r.num_cached_tokens for r in made)
        cached += ranks.blocks.stats.hit_tokens
    assert preempted > 0
    assert cached > 0


def advance(ranks: DataRanks) -> int:
    step = ranks.schedule()
    ranks.expect(step)
    ranks.update(step, sampled(step))
    ranks.check_integrity()
    return len(step.preempted)
