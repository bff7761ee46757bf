"""Scheduler: one test for each behaviour, on caches small enough to see every block. Blocks hold 4 tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError
from flexmoe.scheduling import BlockManager, Request, RequestStatus, Scheduler, Step, StepTokens

SIZE = 4
EOS = 99


def scheduler(num_blocks: int = 64, *, seqs: int = 8, budget: int = 100, caching: bool = False) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=budget)
    return Scheduler(config, BlockManager(num_blocks, SIZE, caching))


def add(to: Scheduler, name: str, tokens: int | Iterable[int], *, watched: bool = False, **sampling: Any) -> Request:
    """Queue a request; a number stands for so many tokens that no other request shares."""
    unshared = range(1000 * ord(name[0]), 1000 * ord(name[0]) + tokens) if isinstance(tokens, int) else tokens
    params = SamplingParams(**{"max_tokens": 8, **sampling})
    request = Request(name, list(unshared), params, eos_token_ids=(EOS,), max_total_tokens=1000)
    request.watched = watched
    to.add(request)
    return request


def shape(step: Step) -> list[tuple[str, int, int, bool]]:
    return [(chunk.request.request_id, chunk.start, chunk.num_tokens, chunk.samples) for chunk in step.chunks]


def advance(to: Scheduler, token: int = 7) -> Step:
    """Schedule a step and record it as computed, the same token sampled everywhere."""
    step = to.schedule()
    to.update(step, [token] * step.num_samples)
    to.check_integrity()
    return step


def finish_all(to: Scheduler, steps: int = 500) -> None:
    for _ in range(steps):
        if not to.has_unfinished:
            break
        assert advance(to).chunks
    assert not to.has_unfinished
    assert to.blocks.num_free == to.blocks.num_blocks


# ------------------------------------------------------------------------------------------------ steps


def test_nothing_to_do_is_an_empty_step() -> None:
    idle = scheduler()
    step = idle.schedule()
    assert (step.chunks, step.num_decodes, step.preempted, step.num_samples) == ([], 0, [], 0)
    assert idle.update(step, []) == []
    assert not idle.has_unfinished


def test_a_request_is_prefilled_then_decoded_then_finished() -> None:
    serving = scheduler()
    request = add(serving, "a", 6, max_tokens=3)
    assert (request.status, serving.num_waiting, serving.num_running) == (RequestStatus.WAITING, 1, 0)
    assert [shape(advance(serving)) for _ in range(3)] == [
        [("a", 0, 6, True)],
        [("a", 6, 1, True)],
        [("a", 7, 1, True)],
    ]
    assert (request.finish_reason, request.output_token_ids, request.blocks) == ("length", [7, 7, 7], [])
    assert (serving.has_unfinished, serving.blocks.num_free) == (False, 64)


def test_update_returns_what_finished_now() -> None:
    serving = scheduler()
    first, second = add(serving, "a", 3, max_tokens=2), add(serving, "b", 3)
    assert serving.update(serving.schedule(), [7, 7]) == []
    assert serving.update(serving.schedule(), [7, EOS]) == [first, second]
    assert (first.finish_reason, second.finish_reason, second.stop_reason) == ("length", "stop", None)


def test_decodes_come_first_then_running_prefills_then_arrivals() -> None:
    serving = scheduler(budget=8)
    add(serving, "a", 3)
    advance(serving)
    add(serving, "b", 12)
    add(serving, "c", 3, watched=True)
    assert shape(advance(serving)) == [("a", 3, 1, True), ("b", 0, 7, False)]
    step = advance(serving)
    assert shape(step) == [("a", 4, 1, True), ("b", 7, 5, True), ("c", 0, 2, False)]
    assert (step.num_decodes, step.num_tokens, step.num_samples) == (1, 8, 2)
    assert shape(advance(serving)) == [("a", 5, 1, True), ("b", 12, 1, True), ("c", 2, 1, True)]


def test_decodes_that_nobody_watches_wait_while_prompts_fill_steps() -> None:
    serving = scheduler(budget=8)
    add(serving, "a", 3)
    advance(serving)
    add(serving, "b", 12)
    add(serving, "c", 6)
    assert shape(advance(serving)) == [("b", 0, 8, False)]
    assert shape(advance(serving)) == [("b", 8, 4, True), ("c", 0, 4, False)]
    assert shape(advance(serving)) == [("a", 3, 1, True), ("b", 12, 1, True), ("c", 4, 2, True)]  # two do not fill it
    assert shape(advance(serving)) == [("a", 4, 1, True), ("b", 13, 1, True), ("c", 6, 1, True)]


def test_prompts_that_nobody_watches_wait_until_they_fill_a_step() -> None:
    serving = scheduler(budget=8, seqs=8)
    for index in range(8):
        add(serving, f"{index}", 1, max_tokens=2 + index)
    for name in "abc":
        add(serving, name, 4)
    names = [[chunk.request.request_id for chunk in advance(serving).chunks] for _ in range(4)]
    assert names[:2] == [list("01234567")] * 2
    assert names[2] == list("1234567"), "of eight seats one is free"
    assert names[3] == ["a", "b"], "two prompts of four tokens fill a step of eight"


def test_prompts_wait_for_no_more_than_an_eighth_of_the_seats() -> None:
    serving = scheduler(budget=8, seqs=4)
    for index in range(4):
        add(serving, f"{index}", 1, max_tokens=2 + 9 * (index > 0))
    for name in "ab":
        add(serving, name, 2)
    shapes = [shape(advance(serving)) for _ in range(3)]
    assert [len(chunks) for chunks in shapes] == [4, 4, 4]
    assert shapes[2][-1] == ("a", 0, 2, True)


@pytest.mark.parametrize(("tokens", "joins"), [(55, False), (47, True)])
def test_prompts_wait_for_blocks_as_for_seats(tokens: int, joins: bool) -> None:
    serving = scheduler(num_blocks=16, budget=16)
    add(serving, "a", tokens)
    for _ in range(4):
        advance(serving)
    for name in "bc":
        add(serving, name, 4 if tokens == 55 else 8)
    names = [chunk.request.request_id for chunk in advance(serving).chunks]
    assert names == (["a", "b"] if joins else ["a"]), "one of 16 blocks is free, or three"


def test_nobody_waits_where_decodes_and_prompts_are_one_pass() -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=8)
    serving = Scheduler(config, BlockManager(64, SIZE, False), one_pass=True)
    add(serving, "a", 3)
    advance(serving)
    add(serving, "b", 12)
    assert shape(advance(serving)) == [("a", 3, 1, True), ("b", 0, 7, False)]


def test_nobody_waits_while_somebody_watches() -> None:
    serving = scheduler(budget=8)
    add(serving, "a", 3)
    advance(serving)
    add(serving, "b", 12)
    watched = add(serving, "c", 3, watched=True)
    assert shape(advance(serving)) == [("a", 3, 1, True), ("b", 0, 7, False)]
    serving.abort(watched.request_id)
    add(serving, "d", 12)
    assert shape(advance(serving)) == [("b", 7, 5, True), ("d", 0, 3, False)]


def test_a_long_prompt_takes_what_the_budget_leaves() -> None:
    serving = scheduler(budget=10)
    add(serving, "a", 24)
    assert [shape(advance(serving)) for _ in range(3)] == [
        [("a", 0, 10, False)],
        [("a", 10, 10, False)],
        [("a", 20, 4, True)],
    ]


def test_a_prompt_with_one_token_left_counts_as_a_decode() -> None:
    serving = scheduler(budget=8)
    add(serving, "a", 7)
    add(serving, "b", 2)
    assert shape(advance(serving)) == [("a", 0, 7, True), ("b", 0, 1, False)]
    add(serving, "c", 2)
    add(serving, "d", 1)
    step = advance(serving)
    assert shape(step) == [("a", 7, 1, True), ("b", 1, 1, True), ("d", 0, 1, True), ("c", 0, 2, True)]
    assert step.num_decodes == 3


def test_no_more_requests_run_than_there_are_seats() -> None:
    serving = scheduler(seqs=2)
    for name in "abc":
        add(serving, name, 3, max_tokens=2)
    advance(serving)
    assert (serving.num_running, serving.num_waiting) == (2, 1)
    advance(serving)
    assert [chunk.request.request_id for chunk in advance(serving).chunks] == ["c"]


def test_no_more_requests_run_than_there_are_tokens_in_the_budget() -> None:
    serving = scheduler(budget=2)
    for name in "abc":
        add(serving, name, 1)
    assert [len(advance(serving).chunks) for _ in range(3)] == [2, 2, 2]
    assert serving.num_waiting == 1


def test_a_step_that_failed_can_be_scheduled_again() -> None:
    serving = scheduler(num_blocks=8)
    add(serving, "a", 8)
    advance(serving)
    add(serving, "b", 9)
    assert shape(serving.schedule()) == shape(serving.schedule()) == [("a", 8, 1, True), ("b", 0, 9, True)]
    serving.check_integrity()


# ------------------------------------------------------------------------------------------------ fairness


def test_nobody_overtakes_a_waiting_request_that_does_not_fit() -> None:
    serving = scheduler(num_blocks=8)
    running, wide, small = add(serving, "a", 16, max_tokens=4), add(serving, "b", 16), add(serving, "c", 2)
    for _ in range(4):
        assert {chunk.request.request_id for chunk in advance(serving).chunks} == {"a"}
    assert (running.finish_reason, wide.status, small.status) == (
        "length",
        RequestStatus.WAITING,
        RequestStatus.WAITING,
    )
    assert [chunk.request.request_id for chunk in advance(serving).chunks] == ["b", "c"]


def test_a_newcomer_does_not_take_the_block_a_running_request_needs_next() -> None:
    serving = scheduler(num_blocks=4)
    add(serving, "a", 8, max_tokens=5)
    advance(serving)
    newcomer = add(serving, "b", 8)
    while serving.num_running == 1 and newcomer.status is RequestStatus.WAITING:
        assert advance(serving).preempted == []
    assert (newcomer.num_preemptions, newcomer.num_output_tokens) == (0, 0)


def test_a_blocked_request_is_looked_up_again_only_when_that_may_help(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = scheduler(num_blocks=8, caching=True)
    add(serving, "a", 12, max_tokens=4)
    add(serving, "b", 17)
    lookups = []
    match = serving.blocks._match
    monkeypatch.setattr(serving.blocks, "_match", lambda request: lookups.append(request.request_id) or match(request))
    advance(serving)
    advance(serving)
    assert lookups == ["a", "b", "b"]  # the blocks that "a" computed might have been a prefix of "b"
    advance(serving)
    advance(serving)
    assert lookups == ["a", "b", "b"]
    advance(serving)
    assert lookups == ["a", "b", "b", "b"]


def test_a_blocked_request_is_admitted_once_a_running_one_has_computed_its_prefix() -> None:
    serving = scheduler(num_blocks=8, caching=True)
    add(serving, "a", range(20), max_tokens=4)
    twin = add(serving, "b", range(20), max_tokens=4)
    assert [chunk.request.request_id for chunk in advance(serving).chunks] == ["a"]
    assert shape(advance(serving)) == [("a", 20, 1, True), ("b", 16, 4, True)]
    assert (twin.num_cached_tokens, serving.blocks.stats.hit_tokens) == (16, 16)


# ------------------------------------------------------------------------------------------------ preemption


def test_the_latest_request_is_preempted_and_recomputed_without_sampling_twice() -> None:
    serving = scheduler(num_blocks=6)
    first, second = add(serving, "a", 8, max_tokens=12), add(serving, "b", 7, max_tokens=10)
    tokens = iter(range(100, 200))
    preempted = []
    for _ in range(40):
        step = serving.schedule()
        serving.check_integrity()
        preempted += step.preempted
        serving.update(step, [next(tokens) for _ in range(step.num_samples)])
    assert (preempted, second.num_preemptions, first.num_preemptions) == ([second], 1, 0)
    assert (len(first.output_token_ids), len(second.output_token_ids)) == (12, 10)
    drawn = sorted(first.output_token_ids + second.output_token_ids)
    assert drawn == list(range(100, 122))  # each sampled token is somebody's, and none was sampled in vain


def test_a_preempted_request_keeps_its_tokens_and_waits_ahead_of_newer_ones() -> None:
    serving = scheduler(num_blocks=5, seqs=2)
    add(serving, "a", 8)
    victim = add(serving, "b", 8, max_tokens=4)
    advance(serving)
    add(serving, "c", 1)
    step = serving.schedule()
    assert step.preempted == [victim]
    assert shape(step) == [("a", 8, 1, True)]
    assert (victim.status, victim.blocks, victim.num_computed_tokens) == (RequestStatus.WAITING, [], 0)
    assert victim.output_token_ids == [7]
    serving.update(step, [7])
    while serving.num_waiting == 2:
        advance(serving)
    assert (victim.status, victim.num_output_tokens) == (RequestStatus.RUNNING, 2)


def test_a_preempted_request_is_not_held_up_by_what_a_newer_one_lacks() -> None:
    serving = scheduler(num_blocks=12)
    add(serving, "a", 16, max_tokens=20)
    add(serving, "b", 5, max_tokens=6)
    victim = add(serving, "c", 12)
    advance(serving)
    wide = add(serving, "d", 44, max_tokens=4)
    while serving.num_running != 1:  # "c" is preempted and "b" finishes in the same step
        step = advance(serving)
    assert step.preempted == [victim]
    advance(serving)
    assert (victim.status, wide.status) == (RequestStatus.RUNNING, RequestStatus.WAITING)


def test_the_latest_request_preempts_itself() -> None:
    serving = scheduler(num_blocks=4)
    add(serving, "a", 7)
    late = add(serving, "b", 3)
    advance(serving)
    advance(serving)
    step = serving.schedule()  # "a" takes the last block, "b" needs another
    assert (step.preempted, shape(step)) == ([late], [("a", 8, 1, True)])
    serving.update(step, [7])
    finish_all(serving)


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    serving = scheduler(num_blocks=6, caching=True)
    add(serving, "a", 8, max_tokens=8)
    victim = add(serving, "b", 11, max_tokens=9)
    while not victim.num_preemptions:
        advance(serving)
    while victim.status is RequestStatus.WAITING:
        step = advance(serving)
    (chunk,) = [chunk for chunk in step.chunks if chunk.request is victim]
    assert chunk.start > 0
    assert victim.num_cached_tokens == 0  # what the first admission found, not this one
    finish_all(serving)


def test_a_preempted_request_is_not_admitted_again_in_the_same_step() -> None:
    serving = scheduler(num_blocks=9, caching=True)
    add(serving, "a", range(13), max_tokens=20)
    victim = add(serving, "b", range(13), max_tokens=20)  # computes the same prompt beside "a"
    while not victim.num_preemptions:
        step = advance(serving)
    assert victim.status is RequestStatus.WAITING
    assert shape(step) == [("a", 16, 1, True)]
    assert shape(advance(serving)) == [("a", 17, 1, True), ("b", 16, 1, True)]  # sharing blocks, both fit


@pytest.mark.parametrize("caching", [False, True])
def test_many_requests_in_a_tiny_cache_all_finish(caching: bool) -> None:
    serving = scheduler(num_blocks=7, seqs=4, budget=6, caching=caching)
    requests = [add(serving, name, 1 + index % 9, max_tokens=10) for index, name in enumerate("abcdefghijkl")]
    finish_all(serving)
    assert all(request.output_token_ids == [7] * 10 for request in requests)
    assert sum(request.num_preemptions for request in requests) > 0


# ------------------------------------------------------------------------------------------------ prefix reuse


def test_a_cached_prompt_computes_only_what_is_new() -> None:
    serving = scheduler(caching=True)
    add(serving, "a", range(10), max_tokens=1)
    advance(serving)
    add(serving, "b", range(10))
    add(serving, "c", range(9))
    step = serving.schedule()
    assert shape(step) == [("c", 8, 1, True), ("b", 8, 2, True)]
    assert step.num_decodes == 1


def test_two_requests_of_one_step_do_not_share_what_neither_has_computed() -> None:
    serving = scheduler(caching=True)
    first, second = add(serving, "a", range(9)), add(serving, "b", range(9))
    assert shape(advance(serving)) == [("a", 0, 9, True), ("b", 0, 9, True)]
    assert not set(first.blocks) & set(second.blocks)


def test_a_prompt_in_chunks_is_shared_as_far_as_it_is_computed() -> None:
    serving = scheduler(caching=True, budget=10)
    add(serving, "a", range(16))
    advance(serving)
    serving.sizes = StepTokens(100, 64)
    add(serving, "b", range(16))
    assert shape(advance(serving)) == [("a", 10, 6, True), ("b", 8, 8, True)]


# ------------------------------------------------------------------------------------------------ ends and refusals


def test_abort_while_waiting_running_and_unknown() -> None:
    serving = scheduler(seqs=1)
    running, waiting = add(serving, "a", 5), add(serving, "b", 5)
    advance(serving)
    for request in (waiting, running):
        assert serving.abort(request.request_id) is request
        assert (request.status, request.finish_reason, request.blocks) == (RequestStatus.FINISHED, "abort", [])
        serving.check_integrity()
    assert serving.abort("a") is None
    assert (serving.has_unfinished, serving.blocks.num_free) == (False, 64)


def test_abort_between_schedule_and_update_drops_the_token() -> None:
    serving = scheduler(caching=True)
    first, second = add(serving, "a", 5), add(serving, "b", 5)
    step = serving.schedule()
    serving.abort("a")
    assert serving.update(step, [11, 12]) == []
    assert (first.output_token_ids, second.output_token_ids) == ([], [12])
    serving.check_integrity()


def test_abort_of_the_blocking_request_lets_the_next_one_in() -> None:
    serving = scheduler(num_blocks=8)
    add(serving, "a", 16)
    add(serving, "b", 20)
    add(serving, "c", 1)
    advance(serving)
    serving.abort("b")
    assert [chunk.request.request_id for chunk in advance(serving).chunks] == ["a", "c"]


def test_finish_for_a_stop_string_frees_at_once() -> None:
    serving = scheduler()
    request = add(serving, "a", 5)
    advance(serving)
    serving.finish(request, "stop", "\n\n")
    assert (request.finish_reason, request.stop_reason, request.blocks) == ("stop", "\n\n", [])
    assert serving.schedule().chunks == []


def test_finish_after_the_end_changes_the_reason_only() -> None:
    serving = scheduler()
    old = add(serving, "a", 5, max_tokens=1)
    advance(serving)
    new = add(serving, "a", 5)
    serving.finish(old, "stop", "!")
    assert (old.finish_reason, old.stop_reason) == ("stop", "!")
    assert (new.status, serving.num_waiting) == (RequestStatus.WAITING, 1)


def test_a_request_that_could_never_fit_is_refused() -> None:
    serving = scheduler(num_blocks=4)
    add(serving, "a", 8, max_tokens=8)
    with pytest.raises(RequestError, match=r"prompt of 8 tokens and may reach 17, but the KV cache holds 16 .*lower"):
        add(serving, "b", 8, max_tokens=9)
    assert serving.num_waiting == 1
    finish_all(serving)


def test_an_id_in_use_is_refused_until_its_request_ends() -> None:
    serving = scheduler()
    add(serving, "a", 3, max_tokens=1)
    with pytest.raises(RequestError, match="request_id='a' is still being served"):
        add(serving, "a", 3)
    advance(serving)
    add(serving, "a", 3)


@pytest.mark.parametrize("tokens", [[], [1, 2]])
def test_update_wants_one_token_for_each_sampling_chunk(tokens: list[int]) -> None:
    serving = scheduler()
    request = add(serving, "a", 3)
    step = serving.schedule()
    with pytest.raises(ValueError, match=f"{len(tokens)} tokens were sampled for a step that samples 1"):
        serving.update(step, tokens)
    assert request.num_computed_tokens == 0


# ------------------------------------------------------------------------------------------------ cost, integrity


class CountedTokens(list[int]):
    """A list of tokens that counts how many of them are looked at."""

    looked_at = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.looked_at += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.looked_at += len(self)
        return super().__iter__()


def test_decoding_does_not_look_at_the_prompt_again() -> None:
    serving = scheduler(budget=1000, num_blocks=300, caching=True)
    request = add(serving, "a", 800, max_tokens=None)
    advance(serving)
    request.token_ids = tokens = CountedTokens(request.token_ids)
    for _ in range(100):
        serving.update(serving.schedule(), [7])
    assert tokens.looked_at == 100  # each new token once, when its block is full


@pytest.mark.parametrize("damage", ["lost", "order", "status", "blocks", "seats", "computed"])
def test_damage_to_the_queues_is_noticed(damage: str) -> None:
    serving = scheduler(seqs=2)
    first, _, third = (add(serving, name, 5) for name in "abc")
    advance(serving)
    if damage == "lost":
        serving._waiting.clear()
    elif damage == "order":
        serving._running.reverse()
    elif damage == "status":
        third.status = RequestStatus.FINISHED
    elif damage == "blocks":
        third.num_computed_tokens = 1
    elif damage == "seats":
        serving.config = SchedulerConfig(max_num_seqs=1)
    else:
        first.num_computed_tokens = 6
    with pytest.raises(AssertionError):
        serving.check_integrity()
