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

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_WIDTH = array("i").itemsize


def packed(token_ids: Sequence[int]) -> bytes:
    """Tokens as they are compared: bytes know their hash, and are one object instead of one for each token."""
    return array("i", token_ids).tobytes()


class PrefixNode:
    """The tokens of one block after those of its parents. depth: blocks on the path to here, this one included."""

    __slots__ = ("blocks", "children", "depth", "parent", "tokens")

    def __init__(self, parent: PrefixNode | None, tokens: bytes, blocks: list[int]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.blocks = blocks
        self.children: dict[bytes, PrefixNode] = {}


@dataclass(frozen=True, slots=True)
class Branch:
    """Nodes that are not in the tree yet, one at least, each the child of the one before. node_of: by their blocks."""

    nodes: list[PrefixNode]
    node_of: dict[int, PrefixNode]


class PrefixCache:
    """Tree of computed blocks, and the order in which the idle ones are given up."""

    __slots__ = ("_block_size", "_idle", "_node_of", "root")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.root = PrefixNode(None, b"", [])
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
            child = node.children.get(packed(token_ids[start : start + size]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def branch(self, parent: PrefixNode, token_ids: Sequence[int], blocks: Sequence[int]) -> Branch:
        """What `graft` can put after `parent` once `blocks` hold these tokens, each a block's worth of them."""
        node, nodes = parent, list[PrefixNode]()
        for tokens, block in zip(self._divided(token_ids), blocks, strict=True):
            child = PrefixNode(node, tokens, [block])
            if nodes:
                node.children[tokens] = child
            node = child
            nodes.append(node)
        return Branch(nodes, dict(zip(blocks, nodes, strict=True)))

    def graft(self, branch: Branch) -> bool:
        """Record that its blocks hold their tokens now. False if others came first: then `insert` is needed."""
        first = branch.nodes[0]
        assert first.parent is not None
        if first.tokens in first.parent.children:
            return False
        first.parent.children[first.tokens] = first
        self._node_of.update(branch.node_of)
        return True

    def insert(
        self, parent: PrefixNode, token_ids: Sequence[int], blocks: Sequence[int]
    ) -> tuple[PrefixNode, list[int]]:
        """Record that `blocks`, which are in use, hold these tokens after `parent`, each a block's worth of them.

        Returns the last one's node, and the idle blocks whose place they take (now without content).
        """
        node, displaced = parent, list[int]()
        for tokens, block in zip(self._divided(token_ids), blocks, strict=True):
            known = node.children.get(tokens) if node.children else None  # most have none: that spares a hash
            if known is None:
                known = node.children[tokens] = PrefixNode(node, tokens, [block])
            else:
                displaced += (idle for idle in known.blocks if idle in self._idle)
                known.blocks.append(block)
            self._node_of[block] = node = known
        for block in displaced:
            del self._idle[block]
            self._detach(block)
        return node, displaced

    def use(self, block: int) -> None:
        """A request shares the block: it is idle no more."""
        self._idle.pop(block, None)

    def release(self, blocks: Sequence[int]) -> Sequence[int]:
        """Nobody uses these blocks any more. Those whose content is not worth keeping are returned, the others stay
        here, idle.
        """
        return [block for block in blocks if not self._keep(block)] if self._node_of else blocks

    def evict(self, count: int) -> list[int]:
        """Give up the `count` least recently used idle blocks. There must be so many."""
        blocks = []
        for _ in range(count):
            block, _ = self._idle.popitem(last=False)
            self._drop(self._node_of.pop(block))
            blocks.append(block)
        return blocks

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

    def _divided(self, token_ids: Sequence[int]) -> list[bytes]:
        """Block by block."""
        data, width = packed(token_ids), self._block_size * _WIDTH
        return [data[start : start + width] for start in range(0, len(data), width)]

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
        """Take a block from its node, which has another one."""
        self._node_of.pop(block).blocks.remove(block)

    def _drop(self, node: PrefixNode) -> None:
        """Take a node, whose only block is given up, from its parent."""
        assert not node.children, f"block {node.blocks[0]} leaves the cache before the blocks that follow it"
        assert node.parent is not None
        siblings = node.parent.children
        if len(siblings) == 1:
            siblings.clear()  # spares a search by a whole block's tokens
        else:
            del siblings[node.tokens]

    def _check_node(self, node: PrefixNode, rank: dict[int, int]) -> None:
        where = f"cached blocks {node.blocks} at depth {node.depth}"
        if not node.blocks or any(self._node_of.get(block) is not node for block in node.blocks):
            raise AssertionError(f"{where}: the tree and the index of blocks disagree")
        if len(node.tokens) != self._block_size * _WIDTH:
            raise AssertionError(f"{where}: {len(node.tokens) // _WIDTH} tokens in a block of {self._block_size}")
        idle = [block for block in node.blocks if block in rank]
        if not idle:
            return
        if len(node.blocks) > 1:
            raise AssertionError(f"{where}: {idle} are idle, yet the node holds more blocks")
        for child in node.children.values():
            if any(rank.get(block, len(rank)) > rank[idle[0]] for block in child.blocks):
                raise AssertionError(f"{where}: evicted before the blocks {child.blocks} that follow")
