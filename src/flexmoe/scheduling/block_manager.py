"""BlockManager: who holds which KV block. Enters: requests. Leaves: their `blocks`, and full blocks to share.

The KV cache is num_blocks blocks of block_size tokens. A block is in exactly one of three states: *held* by one
or more requests, *idle* (nobody holds it, the prefix cache keeps its content), or *blank*. Blank ones are taken
first, idle ones are evicted when those run out, so "free" means blank or idle. A block is held by several
requests only if it is full and computed, and it is never written again: sharing needs no copy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from flexmoe.errors import ConfigError
from flexmoe.scheduling.free_space import FreeSpace
from flexmoe.scheduling.prefix_cache import Branch, PrefixCache, PrefixNode, packed
from flexmoe.scheduling.request import Request

# A request that finds no run of blank blocks may evict so many idle ones before it must (at most 1/32 of all), to
# lie side by side with room to grow by half as many. Without, a cache that was once full scatters every request: in
# a simulation (8192 blocks, 64 requests at a time, up to 128 new tokens each) 3% of the decoded tokens see
# contiguous blocks, with it 94%; where half of the prompts continue an earlier answer 2% and 41%, at the same hit rate.
_EVICT_AHEAD = 32


@dataclass(slots=True)
class PrefixStats:
    """Prompt tokens looked up in the prefix cache, and found there. Recomputation is not counted."""

    queried_tokens: int = 0
    hit_tokens: int = 0


@dataclass(slots=True)
class _Holding:
    """What the manager knows of a request that holds blocks.

    tail: the node of its last block in the prefix cache (the root if it has none there).
    claim: the range of blocks it would like to grow into.
    expected: what its blocks that are being computed will be in the prefix cache.
    """

    tail: PrefixNode
    claim: tuple[int, int]
    expected: Branch | None = None


class BlockManager:
    """Hands out blocks, counts references, and shares computed prefixes."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"num_blocks={num_blocks} and block_size={block_size} must both be at least 1.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = PrefixStats()
        # Grows by at least as much as any waiting request's shortfall shrinks: by blocks freed, blocks that it can
        # now share, blocks no longer kept back. The scheduler asks again only when that may be enough.
        self.num_gained = 0
        self._evict_ahead = min(_EVICT_AHEAD, num_blocks // 32)
        self._references = [0] * num_blocks
        self._space = FreeSpace(num_blocks)
        self._prefixes = PrefixCache(block_size)
        self._holdings: dict[Request, _Holding] = {}

    @property
    def num_free(self) -> int:
        return self._space.num_blank + self._prefixes.num_idle

    @property
    def num_tokens(self) -> int:
        """Tokens that all blocks together can hold."""
        return self.num_blocks * self.block_size

    def allocate(self, request: Request, keep_free: int = 0) -> int:
        """Give a request blocks for all its tokens, sharing what the prefix cache has of them.

        keep_free: blocks that must still be free afterwards. Returns 0, or by how many blocks it fell short
        (nothing has changed then). Sets num_computed_tokens to the length of the shared prefix, which always
        leaves the last token to compute: its logits are what the request is here for.
        """
        path = self._match(request)
        shortfall = self._shortfall(request, path, keep_free)
        if shortfall > 0:
            return shortfall
        request.blocks = [node.blocks[0] for node in path]
        for block in request.blocks:
            self._references[block] += 1
            self._prefixes.use(block)
        claim = self._take_many(request, self._blocks_for(request.num_tokens) - len(path))
        self._holdings[request] = _Holding(path[-1] if path else self._prefixes.root, claim)
        self._count_hit(request, len(path) * self.block_size)
        return 0

    def grow(self, request: Request) -> bool:
        """Give a request one more block. False if none is free."""
        if not self.num_free:
            return False
        if not self._space.num_blank:
            self._evict(1)
        last = request.blocks[-1]
        block = self._space.take_after(last)
        self._references[block] = 1
        request.blocks.append(block)
        request.contiguous = request.contiguous and block == last + 1
        return True

    def expect(self, request: Request, num_tokens: int) -> None:
        """Do most of what register() will do once so many tokens of a request are computed. Nothing is shared yet."""
        if self.enable_prefix_caching:
            holding = self._holdings[request]
            tokens, blocks = self._unshared(request, holding, num_tokens)
            holding.expected = self._prefixes.branch(holding.tail, tokens, blocks) if blocks else None

    def register(self, request: Request) -> None:
        """Let others share the blocks of a request that are full and computed by now."""
        if not self.enable_prefix_caching:
            return
        holding = self._holdings[request]
        branch, holding.expected = holding.expected, None
        tokens, blocks = self._unshared(request, holding, request.num_computed_tokens)
        if branch is not None and len(branch.nodes) == len(blocks) and self._prefixes.graft(branch):
            holding.tail = branch.nodes[-1]
        else:
            holding.tail, displaced = self._prefixes.insert(holding.tail, tokens, blocks)
            self._space.put(displaced)
        self.num_gained += len(blocks)

    def free(self, request: Request) -> None:
        """Take all blocks of a request back. Its registered ones stay shareable until they are evicted."""
        claim = self._holdings.pop(request).claim
        references, unused = self._references, []
        for block in reversed(request.blocks):  # the last first: see prefix_cache
            references[block] -= 1
            if not references[block]:
                unused.append(block)
        self._space.put(self._prefixes.release(unused))
        self._space.unclaim(*claim)
        self.num_gained += self.gain_of(request)
        request.blocks = []
        request.contiguous = True

    def gain_of(self, request: Request) -> int:
        """By how much num_gained grows when a request is freed."""
        return len(request.blocks) + 1  # + 1: the block kept back for its next token

    def check_integrity(self) -> None:
        """Raise AssertionError if a block is lost, leaked, held by mistake or shared before it is computed."""
        self._space.check_integrity()
        self._prefixes.check_integrity()
        held = Counter(block for request in self._holdings for block in request.blocks)
        for block, references in enumerate(self._references):
            if held[block] != references:
                raise AssertionError(f"block {block}: {held[block]} requests hold it, not {references}")
            states = (references > 0, self._prefixes.is_idle(block), block in self._space)
            if sum(states) != 1:
                raise AssertionError(f"block {block}: held, idle, blank = {states}; exactly one must be true")
        for request, holding in self._holdings.items():
            self._check_request(request, holding)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _unshared(self, request: Request, holding: _Holding, num_tokens: int) -> tuple[list[int], list[int]]:
        """Tokens and blocks of a request that are full with its first `num_tokens`, and not in the prefix cache."""
        first, last, size = holding.tail.depth, num_tokens // self.block_size, self.block_size
        return request.token_ids[first * size : last * size], request.blocks[first:last]

    def _match(self, request: Request) -> list[PrefixNode]:
        if not self.enable_prefix_caching:
            return []
        return self._prefixes.match(request.token_ids, (request.num_tokens - 1) // self.block_size)

    def _shortfall(self, request: Request, path: list[PrefixNode], keep_free: int) -> int:
        """Blocks missing to admit the request. A shared block costs one only if it is idle, hence free, now."""
        idle = sum(1 for node in path if self._prefixes.is_idle(node.blocks[0]))
        needed = self._blocks_for(request.num_tokens) - len(path) + idle
        return needed + keep_free - self.num_free

    def _take_many(self, request: Request, count: int) -> tuple[int, int]:
        """Append `count` blocks to a request's shared ones. Returns the range it would like to grow into."""
        self._evict(max(0, count - self._space.num_blank))
        room = self._blocks_for(request.token_limit - 1) - self._blocks_for(request.num_tokens)
        blocks = request.blocks
        if not blocks:
            self._clear_run(count, room)
        blocks += self._space.take_many(count, blocks[-1] if blocks else None, room)
        for block in blocks[len(blocks) - count :]:
            self._references[block] = 1
        request.contiguous = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        claim = (blocks[-1] + 1, blocks[-1] + 1 + (room if request.contiguous else 0))
        self._space.claim(*claim)
        return claim

    def _evict(self, count: int) -> None:
        self._space.put(self._prefixes.evict(count))

    def _clear_run(self, count: int, room: int) -> None:
        """Evict a few blocks early if that gives a new request its run of `count` blocks and some room."""
        wanted = count + min(room, self._evict_ahead // 2)
        for _ in range(min(self._evict_ahead, self._prefixes.num_idle)):
            if self._space.has_run(wanted):
                return
            self._evict(1)

    def _count_hit(self, request: Request, num_cached_tokens: int) -> None:
        request.num_computed_tokens = num_cached_tokens
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_cached_tokens
            self.stats.queried_tokens += request.num_tokens
            self.stats.hit_tokens += num_cached_tokens

    def _check_request(self, request: Request, holding: _Holding) -> None:
        name, size, blocks = request.request_id, self.block_size, request.blocks
        if request.contiguous and blocks != list(range(blocks[0], blocks[0] + len(blocks))):
            raise AssertionError(f"request {name!r}: blocks {blocks} are not contiguous, but are said to be")
        if not holding.tail.depth * size <= request.num_computed_tokens <= len(blocks) * size:
            raise AssertionError(
                f"request {name!r}: {request.num_computed_tokens} tokens computed, "
                f"{holding.tail.depth} blocks of {size} shared, {len(blocks)} held"
            )
        node: PrefixNode | None = holding.tail
        while node is not None and node.depth:
            index = node.depth - 1
            tokens = packed(request.token_ids[index * size : (index + 1) * size])
            if blocks[index] not in node.blocks or node.tokens != tokens:
                raise AssertionError(f"request {name!r}: block {blocks[index]} is cached under other tokens")
            node = node.parent
        for block in blocks[holding.tail.depth :]:
            if self._references[block] != 1 or block in self._prefixes:
                raise AssertionError(f"request {name!r}: block {block} is shared, but may still be written")
