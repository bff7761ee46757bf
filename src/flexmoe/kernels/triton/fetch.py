"""A step's numbers from the host, fetched by the device itself: a graph that begins with it needs no copy before it.

Enters: buffers in pinned memory that take turns, which the host fills. Leaves: the numbers on the device, and a word
to the host that they were read. Whose turn it is both sides count, since launches of one device follow each other.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEAD = 4  # numbers before those that are fetched: how many, and how many of the first ones the device may know better
LEAST = 4096  # numbers that are read without asking how many there are, which would be a way to the host more
TURNS = 3 << 20  # after so many counting begins again: a multiple of any number of buffers up to 4
_HEAD, _TURNS = tl.constexpr(HEAD), tl.constexpr(TURNS)


@triton.jit
def _fetch(
    host_ptr, fetched_ptr, turn_ptr, known_ptr, out_ptr, stride, BUFFERS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (1,). What the host wrote before a launch is seen by its kernels; no cache of a processor keeps it (cg)."""
    turn = tl.load(turn_ptr)
    host_ptr += turn % BUFFERS * stride
    at = tl.arange(0, BLOCK)
    given = tl.load(host_ptr + _HEAD + at, cache_modifier=".cg")
    count = tl.load(host_ptr, cache_modifier=".cg")
    known = tl.load(host_ptr + 1, cache_modifier=".cg")
    better = tl.load(known_ptr + at, mask=at < known, other=-1)
    tl.store(out_ptr + at, tl.where(better >= 0, better.to(tl.int32), given), mask=at < count)
    for begin in range(BLOCK, count, BLOCK):
        place = begin + at
        given = tl.load(host_ptr + _HEAD + place, mask=place < count, other=0, cache_modifier=".cg")
        tl.store(out_ptr + place, given, mask=place < count)
    tl.debug_barrier()  # all is read
    turn = (turn + 1) % _TURNS
    tl.store(turn_ptr, turn)
    tl.store(fetched_ptr, turn)


def fetch(host: Tensor, fetched: Tensor, turn: Tensor, known: Tensor, out: Tensor) -> None:
    """out[i] = known[i] if i is below the second number of the buffer and known[i] >= 0, else its number HEAD + i.

    host: int32 [buffers, n], pinned for a GPU, n a multiple of 16 and at least HEAD + LEAST; each begins with how many
    numbers are to be fetched, and how many of `known` count, at most LEAST.
    turn: int32 [1], on the device, whose turn it is; one more afterwards, modulo TURNS, and so is fetched, int32 [1],
    pinned: from then on the host may fill that buffer again. known: int64, on the device. out: int32.
    """
    buffers, size = host.shape
    if size % 16 or size < HEAD + LEAST or TURNS % buffers:
        raise ValueError(
            f"{buffers} buffers of {size} numbers; give multiples of 16 from {HEAD + LEAST} on, and 1 to 4."
        )
    _fetch[(1,)](host, fetched, turn, known, out, size, BUFFERS=buffers, BLOCK=LEAST, num_warps=16)
