"""Which tiles `flexmoe tune` tries, one function for each operation. Enters: a shape and rows. Leaves: tiles, unordered
and without the operation's own choice; `nearest_first` orders them. What does not fit a GPU fails to compile there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from flexmoe.config.powers import power_of_two
from flexmoe.kernels.triton.decode_attention import DecodeAttentionTile
from flexmoe.kernels.triton.expert_down import DownGemvTile, DownTile
from flexmoe.kernels.triton.expert_gate_up import GateUpGemvTile, GateUpTile
from flexmoe.kernels.triton.norm_linear import DirectTile, DotTile, GemvTile, Tile
from flexmoe.kernels.triton.route import RouteTile

_SHARED_MEMORY = 227 * 1024  # bytes that a program may have on Hopper
_OTHER_KIND = 3  # fields that another kind of tile counts as


def nearest_first(tiles: Iterable[Any], best: Any) -> list[Any]:
    """Those that differ least from the best so far come first: good tiles stand together."""
    return sorted(tiles, key=lambda tile: _changed(tile, best))


def _changed(tile: Any, other: Any) -> int:
    if type(tile) is not type(other):
        return _OTHER_KIND
    own = asdict(other)
    return sum(value != own[name] for name, value in asdict(tile).items())


def linear_tiles(rows: int, n: int, k: int, *, norm: bool, itemsize: int) -> Iterator[Tile]:
    """For norm_linear with x [rows, k] and a weight [n, k]."""
    if rows <= (8 if itemsize == 4 else 4):
        yield from _gemv_tiles(norm)
    if rows <= 32 and itemsize == 2:
        yield from _direct_tiles(rows, n, k, norm)
    if rows >= 8:
        yield from _dot_tiles(rows, n, k, itemsize)


# lanes, warps_n, warps_k, rows, ahead
_GEMV_FORMS = ((4, 1, 8, 2, 4), (4, 4, 1, 2, 8), (4, 2, 4, 1, 8), (8, 1, 8, 1, 8), (4, 1, 4, 1, 8), (4, 1, 8, 2, 8))


def _gemv_tiles(norm: bool) -> Iterator[GemvTile]:
    for lanes, warps_n, warps_k, rows, ahead in _GEMV_FORMS:
        yield GemvTile(lanes, warps_n, warps_k, rows, ahead, x_ahead=2 if norm else 4)


# warps_n, warps_k, rows, ahead, x_ahead
_DIRECT_FORMS = (
    (1, 4, 1, 8, 4), (2, 4, 1, 8, 4), (1, 8, 1, 8, 4), (1, 4, 2, 4, 4), (1, 4, 1, 8, 2), (1, 8, 1, 4, 4),
    (1, 4, 2, 4, 2), (1, 8, 1, 8, 8), (1, 16, 1, 8, 4), (1, 4, 1, 4, 4), (1, 8, 2, 4, 2),
)  # fmt: skip
_HEAD_FORMS = ((2, 2, 1, 8, 4), (4, 1, 1, 8, 4), (4, 2, 1, 8, 2))
_MANY_COLUMNS = 16384  # of a head; small programs by the hundred, so that prefetching for one would come too late


def _direct_tiles(rows: int, n: int, k: int, norm: bool) -> Iterator[DirectTile]:
    head = n >= _MANY_COLUMNS
    fused = (False, True) if norm and rows <= 8 else (False,)
    forms = (*_HEAD_FORMS, *_DIRECT_FORMS) if head else _DIRECT_FORMS
    for fuse, prefetch, form in itertools.product(fused, (0,) if head else (0, 2048), forms):
        warps_n, warps_k, own_rows, ahead, x_ahead = form
        registers = 8 * own_rows * ahead + (8 if fuse else 4) * x_ahead * -(-rows // 8)
        if registers <= (80 if warps_n * warps_k == 16 else 144) and (not prefetch or ahead * 32 * warps_k < k):
            yield DirectTile(warps_n, warps_k, own_rows, ahead, x_ahead, prefetch=prefetch, fuse_norm=fuse)


# block_n, block_k, warps, stages
_DOT_FORMS = (
    (64, 128, 4, 4), (64, 64, 4, 5), (64, 128, 4, 3), (32, 128, 4, 5), (128, 64, 4, 4), (128, 64, 8, 4),
    (32, 64, 4, 6), (16, 256, 4, 3), (32, 256, 4, 3), (128, 128, 8, 3),
)  # fmt: skip


def _dot_tiles(rows: int, n: int, k: int, itemsize: int) -> Iterator[DotTile]:
    largest = min(128, max(16, power_of_two(rows)))
    prefetches = (0,) if n >= _MANY_COLUMNS else (0, 1024)
    for splits, prefetch, block_t, (block_n, block_k, warps, stages) in itertools.product(
        (1, 2, 4, 8), prefetches, sorted({largest, min(64, largest)}, reverse=True), _DOT_FORMS
    ):
        block_k = block_k * 2 // itemsize
        programs = -(-n // block_n) * -(-rows // block_t) * splits
        fits = (block_t + block_n) * block_k * itemsize * stages <= 200_000
        if fits and k >= 512 * splits and (programs >= 100 or splits == 4) and (splits == 1 or programs <= 400):
            yield DotTile(block_t, block_n, block_k, splits, warps, stages, prefetch)


# keys, warps, stages
_ATTENTION_FORMS = (
    (32, 4, 1), (16, 4, 1), (64, 4, 1), (32, 2, 1), (16, 2, 1), (32, 8, 1), (64, 8, 1), (16, 1, 1),
    (32, 4, 3), (32, 4, 5), (64, 4, 5), (32, 4, 7),
)  # fmt: skip
_MOST_SPLITS = 128


def attention_tiles(
    rows: int, heads: int, kv_heads: int, default: DecodeAttentionTile, itemsize: int
) -> Iterator[DecodeAttentionTile]:
    """For decode attention: around the default's number of splits. Tensor cores would round fp32."""
    either = heads > kv_heads and rows <= 8 and itemsize == 2
    ways = (default.per_head, not default.per_head) if either else (default.per_head,)
    splits = {1, max(1, default.splits // 2), default.splits, min(_MOST_SPLITS, default.splits * 2)}
    for per_head, count, (keys, warps, stages) in itertools.product(ways, sorted(splits), _ATTENTION_FORMS):
        if per_head and stages > 1:
            continue
        tile = DecodeAttentionTile(keys, warps, stages, count, keys, per_head)
        yield tile
        if count > 1:
            yield replace(tile, min_split=keys * 4)


def route_tiles(rows: int, hidden: int, experts: int, itemsize: int) -> Iterator[RouteTile]:
    """For the norm and the router: few rows, and many where that is not hopeless."""
    for block_e, warps in itertools.product((1, 2, 4, 8), (2, 4, 8, 16)):
        held = block_e * hidden // (32 * warps)
        if block_e <= experts and 8 <= held <= 64 and rows * experts // block_e <= 8192:
            yield RouteTile(1, block_e, 0, warps, 1)
    if rows < 16 or itemsize == 4:  # exact products of fp32 weights: the operation's own tiles fit these alone
        return
    sides = ((16, 16), (32, 32), (64, 32), (64, 64), (64, 128))
    for (block_t, block_e), block_k, warps in itertools.product(sides, (64, 128, 256), (2, 4)):
        fits = (block_t + block_e) * block_k * itemsize * 4 <= 160 << 10
        useful = block_e < 2 * max(16, experts) and block_t <= rows and 64 <= block_t * block_e // warps <= 2048
        if fits and useful and (block_t < 64 or block_k < 256):
            yield RouteTile(block_t, block_e, block_k, warps, 4)


def gate_up_gemv_tiles(hidden: int, itemsize: int) -> Iterator[GateUpGemvTile]:
    """Whole rows in registers or on their way through shared memory, and rows in chunks."""
    longest = min(8192 // itemsize, power_of_two(hidden))
    for part, pairs, warps in itertools.product((1, 2, 4), (1, 2), (1, 2, 4, 8)):
        columns = longest // part
        burst = warps * pairs * 2 * columns * itemsize
        whole = columns >= hidden
        for steps, stages in ((1, 1), (2, 1), (4, 1), (4, 3)) if whole else ((1, 1), (2, 1), (1, 3)):
            fits = burst // warps <= 16384 if stages == 1 else 8192 <= burst * (stages - 1) <= _SHARED_MEMORY // 2
            if fits and columns >= 512:
                yield GateUpGemvTile(pairs, columns, steps, warps, stages)


def down_gemv_tiles(width: int, top_k: int, itemsize: int) -> Iterator[DownGemvTile]:
    """All of F at once where it fits, else chunks in registers or on their way through shared memory."""
    chunks = (1024, 512, 256) if width <= 1024 else (2048, 1024, 4096)
    for columns, outputs, warps, stages in itertools.product(chunks, (2, 4, 1, 8), (8, 4, 2, 16), (1, 3)):
        burst = outputs * columns * top_k * itemsize
        fits = burst // warps <= 16384 if stages == 1 else 8192 <= burst * (stages - 1) <= _SHARED_MEMORY // 2
        split = max(1, warps // power_of_two(top_k))
        if fits and columns // split >= 512 // itemsize and (stages == 1 or columns < width):
            yield from (DownGemvTile(outputs, columns, warps, stages, early) for early in (False, True))


_DEPTHS = ((64, 5), (64, 4), (128, 3), (128, 4), (64, 6))  # block_k and num_stages
_WAYS = ((True, False), (True, True), (False, False), (False, True))  # swap and tma


def gate_up_tiles(best: GateUpTile, itemsize: int) -> Iterator[GateUpTile]:
    """Grouped: around the rows of an expert that the default expects. None in fp32, which no tensor core computes."""
    if itemsize > 2:
        return
    for m, way, n, (k, stages) in itertools.product(_near(best.block_m), _WAYS, (64, 128, 32), _DEPTHS):
        needs = (m + 2 * n) * k * itemsize * stages
        if 48 * 1024 <= needs <= _SHARED_MEMORY - 2048 and not (way[0] and n < 64):
            yield GateUpTile(m, n, k, 8 if m * n >= 64 * 128 else 4, stages, *way)


def down_tiles(best: DownTile, itemsize: int) -> Iterator[DownTile]:
    """Grouped: around the rows of an expert that the default expects. None in fp32, which no tensor core computes."""
    if itemsize > 2:
        return
    for m, way, n, (k, stages) in itertools.product(_near(best.block_m), _WAYS, (128, 64, 256), _DEPTHS):
        needs = (m + n) * k * itemsize * stages
        if 40 * 1024 <= needs <= _SHARED_MEMORY - 2048 and m * n <= 128 * 256:
            yield DownTile(m, n, k, 8 if m * n >= 64 * 256 else 4, stages, *way)


def _near(block_m: int) -> tuple[int, ...]:
    return (block_m, block_m * 2) if block_m < 64 else (block_m, block_m // 2)
