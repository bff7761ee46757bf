"""BlockManager and its two halves: free space (where) and prefix cache (what). Blocks hold 4 tokens here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import ConfigError
from flexmoe.scheduling import BlockManager, Request
from flexmoe.scheduling.free_space import FreeSpace
from flexmoe.scheduling.prefix_cache import PrefixCache

SIZE = 4


def request(tokens: Sequence[int], *, limit: int | None = None) -> Request:
    """A request that may reach `limit` tokens; just enough for one new one if not given."""
    params = SamplingParams(max_tokens=None)
    return Request("r", tokens, params, eos_token_ids=(), max_total_tokens=limit or len(tokens) + 1)


def admit(blocks: BlockManager, tokens: Sequence[int], *, limit: int | None = None) -> Request:
    admitted = request(tokens, limit=limit)
    assert blocks.allocate(admitted) == 0
    return admitted


def compute(blocks: BlockManager, done: Request) -> Request:
    """All tokens of the request were computed."""
    done.num_computed_tokens = done.num_tokens
    blocks.register(done)
    blocks.check_integrity()
    return done


def serve(blocks: BlockManager, tokens: Sequence[int]) -> list[int]:
    """Admit, compute and free a request. Returns the blocks it had."""
    done = compute(blocks, admit(blocks, tokens))
    held = done.blocks
    blocks.free(done)
    blocks.check_integrity()
    return held


def cached_tokens(blocks: BlockManager, tokens: Sequence[int]) -> int:
    """How much of a prompt could be shared, without doing so."""
    return len(blocks._match(request(tokens))) * SIZE


def prompt(start: int, blocks: int = 1) -> list[int]:
    """Full blocks, and one token more: what can be shared entirely."""
    return list(range(start, start + blocks * SIZE + 1))


# ------------------------------------------------------------------------------------------------ where


def test_virgin_blocks_are_taken_in_ascending_order() -> None:
    blocks = BlockManager(8, SIZE, True)
    assert admit(blocks, range(9)).blocks == [0, 1, 2]
    assert admit(blocks, range(50, 58)).blocks == [3, 4]
    assert blocks.num_free == 3


def test_a_request_grows_into_the_block_behind_its_last() -> None:
    blocks = BlockManager(8, SIZE, True)
    growing = admit(blocks, range(4), limit=12)
    assert blocks.grow(growing)
    assert (growing.blocks, growing.contiguous) == ([0, 1], True)


def test_newcomers_leave_a_request_room_to_grow_in_place() -> None:
    blocks = BlockManager(8, SIZE, True)
    first = admit(blocks, range(4), limit=13)  # up to 12 tokens in the cache: the last one is never computed
    second = admit(blocks, range(50, 54))
    assert (first.blocks, second.blocks) == ([0], [3])
    assert blocks.grow(first)
    assert (first.blocks, first.contiguous) == ([0, 1], True)


def test_room_to_grow_is_given_up_when_nothing_else_is_blank() -> None:
    blocks = BlockManager(3, SIZE, True)
    first = admit(blocks, range(4), limit=12)
    second = admit(blocks, range(50, 58))
    assert second.blocks == [1, 2]
    assert not blocks.grow(first)
    blocks.free(second)
    assert blocks.grow(first)
    assert first.contiguous
    blocks.check_integrity()


def test_growing_elsewhere_ends_contiguity_until_the_blocks_are_freed() -> None:
    blocks = BlockManager(4, SIZE, False)
    first, second = admit(blocks, range(4), limit=5), admit(blocks, range(4), limit=5)
    assert blocks.grow(first)
    assert (first.blocks, first.contiguous, second.blocks) == ([0, 2], False, [1])
    blocks.free(first)
    assert (first.blocks, first.contiguous) == ([], True)


def test_scattered_blocks_serve_when_no_run_is_left() -> None:
    blocks = BlockManager(5, SIZE, False)
    single = [admit(blocks, range(4)) for _ in range(5)]
    for index in (0, 2, 4):
        blocks.free(single[index])
    wide = admit(blocks, range(12))
    assert (wide.blocks, wide.contiguous) == ([0, 2, 4], False)


def test_a_full_cache_still_gives_contiguous_blocks() -> None:
    blocks = BlockManager(256, SIZE, True)
    for start in range(0, 10000, 50):
        serve(blocks, prompt(start, blocks=2))
    late = admit(blocks, prompt(20000, blocks=2), limit=17)
    assert blocks.grow(late)
    assert late.contiguous


def test_free_space_keeps_clear_of_claims_while_it_can() -> None:
    space = FreeSpace(6)
    space.claim(1, 4)
    assert space.take_many(2, None, 0) == [4, 5]
    assert space.take_many(2, None, 0) == [0, 1]
    space.unclaim(1, 4)
    space.check_integrity()


def test_free_space_notices_a_block_freed_twice() -> None:
    space = FreeSpace(2)
    with pytest.raises(AssertionError, match="block 1 is freed twice"):
        space.put([1])


@pytest.mark.parametrize(("num_blocks", "size"), [(0, 4), (4, 0)])
def test_an_empty_cache_is_refused(num_blocks: int, size: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        BlockManager(num_blocks, size, True)


# ------------------------------------------------------------------------------------------------ what is shared


def test_a_computed_prefix_is_shared_by_whole_blocks() -> None:
    blocks = BlockManager(8, SIZE, True)
    first = compute(blocks, admit(blocks, range(11)))
    second = admit(blocks, [*range(8), 70, 71])
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert second.num_computed_tokens == second.num_cached_tokens == 8
    blocks.check_integrity()


def test_nothing_is_shared_before_it_is_computed() -> None:
    blocks = BlockManager(8, SIZE, True)
    first = admit(blocks, range(9))
    assert cached_tokens(blocks, range(9)) == 0
    first.num_computed_tokens = 7  # one block and most of the next
    blocks.register(first)
    assert cached_tokens(blocks, range(9)) == 4


@pytest.mark.parametrize(("length", "shared"), [(4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_wholly_cached_prompt_computes_at_least_its_last_token(length: int, shared: int) -> None:
    blocks = BlockManager(8, SIZE, True)
    serve(blocks, range(12))
    assert cached_tokens(blocks, range(length)) == shared


def test_generated_tokens_are_shared_too() -> None:
    blocks = BlockManager(8, SIZE, True)
    chat = admit(blocks, range(3), limit=12)
    for token in range(3, 8):
        chat.append(token)
        if chat.num_tokens > len(chat.blocks) * SIZE:
            assert blocks.grow(chat)
    compute(blocks, chat)
    blocks.free(chat)
    assert cached_tokens(blocks, range(9)) == 8


def test_the_same_tokens_after_another_prefix_are_not_shared() -> None:
    blocks = BlockManager(8, SIZE, True)
    serve(blocks, [1, 1, 1, 1, 2, 2, 2, 2, 0])
    assert cached_tokens(blocks, [2, 2, 2, 2, 0]) == 0
    assert cached_tokens(blocks, [3, 3, 3, 3, 2, 2, 2, 2, 0]) == 0


def test_prefixes_with_equal_hashes_are_not_confused() -> None:
    assert hash((-1,) * SIZE) == hash((-2,) * SIZE)
    blocks = BlockManager(8, SIZE, True)
    serve(blocks, [-1] * SIZE + [0])
    assert cached_tokens(blocks, [-2] * SIZE + [0]) == 0
    assert cached_tokens(blocks, [-1] * SIZE + [0]) == SIZE


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    blocks = BlockManager(2, SIZE, False)
    assert serve(blocks, range(5)) == serve(blocks, range(5)) == [0, 1]
    assert (cached_tokens(blocks, range(5)), blocks.stats.hit_tokens) == (0, 0)


def test_the_same_prompt_computed_side_by_side_is_kept_once() -> None:
    blocks = BlockManager(8, SIZE, True)
    first, second = admit(blocks, prompt(0, 2)), admit(blocks, prompt(0, 2))
    compute(blocks, first)
    compute(blocks, second)
    assert not set(first.blocks) & set(second.blocks)
    blocks.free(first)
    assert cached_tokens(blocks, prompt(0, 2)) == 8
    blocks.free(second)
    blocks.check_integrity()
    assert blocks.num_free == 8
    assert cached_tokens(blocks, prompt(0, 2)) == 8


def test_a_block_in_use_takes_the_place_of_an_idle_twin() -> None:
    blocks = BlockManager(8, SIZE, True)
    first, second = admit(blocks, prompt(0, 2)), admit(blocks, prompt(0, 2))
    blocks.free(compute(blocks, first))
    compute(blocks, second)
    third = admit(blocks, prompt(0, 2))
    assert third.blocks[:2] == second.blocks[:2]
    blocks.check_integrity()


def test_statistics_count_tokens_looked_up_and_found_on_first_admission_only() -> None:
    blocks = BlockManager(8, SIZE, True)
    serve(blocks, range(9))
    again = request(range(9))
    blocks.allocate(again)
    blocks.free(again)
    again.num_preemptions = 1
    blocks.allocate(again)
    assert (blocks.stats.queried_tokens, blocks.stats.hit_tokens) == (18, 8)
    assert again.num_cached_tokens == 8


# ------------------------------------------------------------------------------------------------ what is given up


def test_idle_blocks_are_free_but_keep_their_content_until_evicted() -> None:
    blocks = BlockManager(4, SIZE, True)
    serve(blocks, prompt(0, 2))
    assert blocks.num_free == 4
    assert cached_tokens(blocks, prompt(0, 2)) == 8
    serve(blocks, range(100, 116))
    assert cached_tokens(blocks, prompt(0, 2)) == 0


def test_the_least_recently_used_block_is_evicted_first_and_the_tail_before_the_head() -> None:
    blocks = BlockManager(6, SIZE, True)
    for start in (0, 100, 200):
        serve(blocks, range(start, start + 8))
    newcomer = admit(blocks, range(900, 904))
    assert [cached_tokens(blocks, prompt(start, 2)) for start in (0, 100, 200)] == [4, 8, 8]
    serve(blocks, range(5))  # uses the head of the oldest prompt again, and evicts one more block
    assert [cached_tokens(blocks, prompt(start, 2)) for start in (0, 100, 200)] == [4, 4, 8]
    assert blocks.grow(newcomer)  # takes what serve() left blank
    assert blocks.grow(newcomer)
    assert [cached_tokens(blocks, prompt(start, 2)) for start in (0, 100, 200)] == [4, 0, 8]


def test_shared_blocks_are_freed_by_the_last_of_their_holders() -> None:
    blocks = BlockManager(3, SIZE, True)
    first = compute(blocks, admit(blocks, prompt(0, 1)))
    second = admit(blocks, prompt(0, 1))
    blocks.free(first)
    assert blocks.num_free == 1
    blocks.free(second)
    assert blocks.num_free == 3
    blocks.check_integrity()


def test_allocation_says_how_many_blocks_are_missing_and_changes_nothing() -> None:
    blocks = BlockManager(4, SIZE, True)
    admit(blocks, range(4))
    wide = request(range(50, 66))
    assert blocks.allocate(wide) == 1
    assert blocks.allocate(wide, keep_free=2) == 3
    assert (wide.blocks, blocks.num_free, blocks.stats.queried_tokens) == ([], 3, 4)
    blocks.check_integrity()


def test_shared_blocks_in_use_cost_nothing_and_idle_ones_do() -> None:
    blocks = BlockManager(3, SIZE, True)
    holder = compute(blocks, admit(blocks, prompt(0, 2)))
    assert blocks.allocate(request([*range(8), 70])) == 1
    blocks.free(holder)
    assert blocks.allocate(request([*range(8), 70]), keep_free=1) == 1
    assert blocks.allocate(request([*range(8), 70])) == 0


# ------------------------------------------------------------------------------------------------ integrity


def test_expected_blocks_are_shared_once_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BlockManager(16, SIZE, True)
    first = admit(blocks, prompt(0, 3))
    blocks.expect(first, first.num_tokens)
    assert cached_tokens(blocks, prompt(0, 3)) == 0
    blocks.check_integrity()
    monkeypatch.setattr(PrefixCache, "insert", None)  # nothing is left for it
    gained = blocks.num_gained
    compute(blocks, first)
    assert (blocks.num_gained - gained, cached_tokens(blocks, prompt(0, 3))) == (3, 12)
    more = admit(blocks, [*prompt(0, 3)[:-1], *range(100, 109)])
    assert more.num_computed_tokens == 12
    blocks.expect(more, 20)  # two blocks more, behind those of another request
    more.num_computed_tokens = 20
    blocks.register(more)
    blocks.check_integrity()
    assert cached_tokens(blocks, more.token_ids) == 20


def test_what_was_expected_gives_way_to_what_came_first() -> None:
    blocks = BlockManager(16, SIZE, True)
    twins = [admit(blocks, prompt(0, 3)) for _ in range(2)]
    for twin in twins:
        blocks.expect(twin, twin.num_tokens)
    for twin in twins:
        compute(blocks, twin)
    for twin in twins:
        blocks.free(twin)
        blocks.check_integrity()
    assert (blocks.num_free, cached_tokens(blocks, prompt(0, 3))) == (16, 12)


@pytest.mark.parametrize("computed", [0, 3, 5, 8, 13])
def test_what_was_expected_and_not_computed_is_not_shared(computed: int) -> None:
    """A step broke down, and the next one has another piece of the prompt; 0: the request is aborted."""
    blocks = BlockManager(16, SIZE, True)
    held = admit(blocks, prompt(0, 3))
    blocks.expect(held, 12)
    if computed:
        held.num_computed_tokens = computed
        blocks.register(held)
        blocks.check_integrity()
    assert cached_tokens(blocks, prompt(0, 3)) == computed // SIZE * SIZE
    blocks.free(held)
    blocks.check_integrity()
    assert blocks.num_free == 16


def test_without_a_prefix_cache_nothing_is_expected() -> None:
    blocks = BlockManager(16, SIZE, False)
    held = admit(blocks, prompt(0, 3))
    blocks.expect(held, 12)
    assert cached_tokens(blocks, compute(blocks, held).token_ids) == 0


def lose_a_reference(blocks: BlockManager, held: Request) -> None:
    blocks._references[held.blocks[0]] += 1


def hold_a_blank_block(blocks: BlockManager, held: Request) -> None:
    held.blocks.append(7)


def free_a_held_block(blocks: BlockManager, held: Request) -> None:
    blocks._space.put([held.blocks[-1]])


def miscount_blank_blocks(blocks: BlockManager, held: Request) -> None:
    blocks._space.num_blank += 1


def offer_a_held_block(blocks: BlockManager, held: Request) -> None:
    blocks._space._unclaimed[held.blocks[0]] = 1


def rewrite_shared_tokens(blocks: BlockManager, held: Request) -> None:
    held.token_ids[0] += 1


def forget_computed_tokens(blocks: BlockManager, held: Request) -> None:
    held.num_computed_tokens = 0


def claim_contiguity(blocks: BlockManager, held: Request) -> None:
    held.blocks.reverse()


def share_a_block_being_written(blocks: BlockManager, held: Request) -> None:
    blocks._prefixes._node_of[held.blocks[-1]] = blocks._prefixes._node_of[held.blocks[0]]


def idle_a_held_block(blocks: BlockManager, held: Request) -> None:
    blocks._prefixes._idle[held.blocks[0]] = None


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_reference,
        hold_a_blank_block,
        free_a_held_block,
        miscount_blank_blocks,
        offer_a_held_block,
        rewrite_shared_tokens,
        forget_computed_tokens,
        claim_contiguity,
        share_a_block_being_written,
        idle_a_held_block,
    ],
)
def test_damage_is_noticed(damage: Callable[[BlockManager, Request], None]) -> None:
    blocks = BlockManager(8, SIZE, True)
    held = compute(blocks, admit(blocks, prompt(0, 2)))
    damage(blocks, held)
    with pytest.raises(AssertionError):
        blocks.check_integrity()


def cache_of_two() -> PrefixCache:
    """Block 0 and, after it, block 1; both idle, the tail to be evicted first."""
    cache = PrefixCache(2)
    head, _ = cache.insert(cache.root, [1, 2], [0])
    cache.insert(head, [3, 4], [1])
    assert cache.release([1, 2, 0]) == [2]  # 2 is not here
    cache.check_integrity()
    return cache


@pytest.mark.parametrize("counts", [(1, 1), (2,)])
def test_the_prefix_cache_evicts_leaves_first(counts: Sequence[int]) -> None:
    cache = cache_of_two()
    assert [block for count in counts for block in cache.evict(count)] == [1, 0]
    assert (cache.num_idle, cache.root.children) == (0, {})


def test_idle_blocks_give_way_to_those_that_hold_the_same() -> None:
    cache = cache_of_two()
    _, displaced = cache.insert(cache.root, [1, 2, 3, 4, 5, 6], [5, 6, 7])
    assert (displaced, cache.num_idle) == ([0, 1], 0)
    cache.check_integrity()
    assert cache.release([7, 6, 5]) == []
    assert cache.evict(3) == [7, 6, 5]


def test_a_branch_is_in_the_tree_once_it_is_grafted() -> None:
    cache = cache_of_two()
    (head,) = cache.root.children.values()
    branch, twin = (cache.branch(head, [7, 8, 9, 9], blocks) for blocks in ([5, 6], [8, 9]))
    cache.check_integrity()
    assert len(head.children) == 1
    assert cache.graft(branch)
    assert not cache.graft(twin)
    assert [node.blocks for node in cache.match([1, 2, 7, 8, 9, 9], 3)] == [[0], [5], [6]]


@pytest.mark.parametrize("damage", ["order", "twin", "tokens", "index", "lost"])
def test_damage_to_the_prefix_cache_is_noticed(damage: str) -> None:
    cache = cache_of_two()
    (head,) = cache.root.children.values()
    if damage == "order":
        cache._idle.move_to_end(1)
    elif damage == "twin":
        cache._node_of[5] = head
        head.blocks.append(5)
    elif damage == "tokens":
        head.tokens = head.tokens[:-1]
    elif damage == "index":
        del cache._node_of[0]
    else:
        head.children.clear()
    with pytest.raises(AssertionError):
        cache.check_integrity()
