"""PrefixCache: finds blocks that already hold a prefix. Enters: token ids, full blocks. Leaves: blocks to share.

A tree: a node is one block's worth of tokens *after* the tokens of its parents, so a path from the root is an
exact prefix, and a look-up compares tokens, not digests: no prefix can be mistaken for another.

A node holds one block, or several while requests that computed the same tokens side by side still use theirs.
A block that nobody uses is *idle*: it keeps its content until it is evicted, least recently used first. Three
facts hold, and eviction rests on them: a node's blocks are all in use or it has exactly one, idle; below an idle
node all are idle; and a node becomes idle after its children (requests release their last block first). So the
block evicted first is always a leaf, and no cached block ever loses its way to the root.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

Tokens = tuple[int, ...]


class PrefixNode:
    """The tokens of one block after those of its parents. depth: blocks on the path to here, this one included."""

    __slots__ = ("blocks", "children", "depth", "parent", "tokens")

    def __init__(self, parent: PrefixNode | None, tokens: Tokens) -> None:
        self.parent = parent
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.blocks: list[int] = []
        self.children: dict[Tokens, PrefixNode] = {}


class PrefixCache:
    """Tree of computed blocks, and the order in which the idle ones are given up."""

    __slots__ = ("_block_size", "_idle", "_node_of", "root")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.root = PrefixNode(None, ())
        self._node_of: dict[int, PrefixNode] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # first: least recently used

    def __contains__(self, block: int) -> bool:
        return block in self._node_of

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def match(self, token_ids: Sequence[int], max_blocks: int) -> list[PrefixNode]:
        """The longest path that the tokens follow, at most max_blocks long. Changes nothing."""
        size, node, path = self._block_size, self.root, []
        for start in range(0, max_blocks * size, size):
            child = node.children.get(tuple(token_ids[start : start + size]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def insert(self, parent: PrefixNode, tokens: Tokens, block: int) -> tuple[PrefixNode, int | None]:
        """Record that `block`, which is in use, holds `tokens` after `parent`.

        Returns its node, and the idle block it takes the place of (now without content), if there was one.
        """
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = PrefixNode(parent, tokens)
        displaced = next((b for b in node.blocks if b in self._idle), None)
        node.blocks.append(block)
        self._node_of[block] = node
        if displaced is not None:
            del self._idle[displaced]
            self._detach(displaced)
        return node, displaced

    def use(self, block: int) -> None:
        """A request shares the block: it is idle no more."""
        self._idle.pop(block, None)

    def release(self, blocks: Sequence[int]) -> Sequence[int]:
        """Nobody uses these blocks any more. Those whose content is not worth keeping are returned, the others stay
        here, idle.
        """
        return [block for block in blocks if not self._keep(block)] if self._node_of else blocks

    def evict(self) -> int:
        """Give up the least recently used idle block. There must be one."""
        block, _ = self._idle.popitem(last=False)
        self._detach(block)
        return block

    def nodes(self) -> Iterator[PrefixNode]:
        """Every node but the root, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_integrity(self) -> None:
        rank = {block: i for i, block in enumerate(self._idle)}
        seen = 0
        for node in self.nodes():
            self._check_node(node, rank)
            seen += len(node.blocks)
        if seen != len(self._node_of):
            raise AssertionError(f"{len(self._node_of)} blocks are cached, {seen} can be reached from the root")

    def _keep(self, block: int) -> bool:
        """Whether the block is worth keeping now that nobody uses it: then it is idle."""
        node = self._node_of.get(block)
        if node is None:
            return False
        if len(node.blocks) > 1:
            self._detach(block)
            return False
        self._idle[block] = None
        return True

    def _detach(self, block: int) -> None:
        node = self._node_of.pop(block)
        node.blocks.remove(block)
        if not node.blocks:
            assert not node.children, f"block {block} leaves the cache before the blocks that follow it"
            assert node.parent is not None
            del node.parent.children[node.tokens]

    def _check_node(self, node: PrefixNode, rank: dict[int, int]) -> None:
        where = f"cached blocks {node.blocks} at depth {node.depth}"
        if not node.blocks or any(self._node_of.get(block) is not node for block in node.blocks):
            raise AssertionError(f"{where}: the tree and the index of blocks disagree")
        if len(node.tokens) != self._block_size:
            raise AssertionError(f"{where}: {len(node.tokens)} tokens in a block of {self._block_size}")
        idle = [block for block in node.blocks if block in rank]
        if not idle:
            return
        if len(node.blocks) > 1:
            raise AssertionError(f"{where}: {idle} are idle, yet the node holds more blocks")
        for child in node.children.values():
            if any(rank.get(block, len(rank)) > rank[idle[0]] for block in child.blocks):
                raise AssertionError(f"{where}: evicted before the blocks {child.blocks} that follow")
