"""Draw a token a row, without sorting. Enters: logits fp32 [T, V], SampleParams. Leaves: tokens int64 [T].

Launches: `_survey` finds the largest and the lowest logit of each chunk; the launches of `sample_bounds` turn top_k
and top_p into a bound, how far below the largest a logit may lie; `_weigh_chunks` sums the weights of each chunk's
tokens within it; `_pick` finds the chunk, and in it the token, at which the running sum passes uniform * total. Rows
that do not need a launch leave it at once: one CUDA graph serves all parameters. Weights are summed as whole numbers,
so a row's token is the same whatever the tiles and the batch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.sample import SampleParams
from flexmoe.kernels.triton import sample_bounds as bounds
from flexmoe.kernels.triton.argmax import (
    best_candidate,
    candidate_logit,
    candidate_token,
    candidates,
    carve,
    ordered_key,
)
from flexmoe.kernels.triton.sample_bounds import REACH, divisor, filters_of, weigh

_MOST_TOKENS = 500_000  # whose weights, 2^44 units each at most, an int64 can sum, rounded up, too
_LAST = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class SampleTile:
    """How `sample` is cut up; sizes are powers of two.

    chunk: logits of a program of the first and the last launches. slice: of a program of those that look for bounds, at
    most 2048. rounds, lanes: how often these narrow the bounds, and with how many probes. enough: tokens in doubt that
    need no further round. room: logits in doubt that a row has room for; where there are more, the row itself is
    bisected, slowly. block: logits that a program of that launch looks at together.
    """

    chunk: int = 1024
    chunk_warps: int = 4
    slice: int = 512
    slice_warps: int = 4
    rounds: int = 3
    lanes: int = 16
    enough: int = 128
    room: int = 2048
    block: int = 256
    row_warps: int = 4


@triton.jit
def _survey(
    logits_ptr, stride, V, peaks_ptr, depths_ptr, tally_ptr, C, WORDS, CHUNK: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        # In this order, so that the next launch starts only when the logits are complete: it and those behind it may
        # read them, though nothing else, before their own wait.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = tl.load(logits_ptr + row * stride + tokens, mask=tokens < V, other=float("-inf"))
    tl.store(peaks_ptr + row * C + chunk, tl.max(candidates(logits, tokens)))
    finite = tl.where(logits > float("-inf"), logits, float("inf"))
    tl.store(depths_ptr + row * C + chunk, (ordered_key(tl.min(finite)) ^ -1).to(tl.int64))
    if chunk == 0:
        words = tl.arange(0, BLOCK_WORDS)
        tl.store(tally_ptr + row * WORDS + words, tl.zeros([BLOCK_WORDS], tl.int64), mask=words < WORDS)


@triton.jit
def _kept(logits, peak, temperature, bound, min_p):
    """The weights of the tokens that all filters keep, as integers; 0 for the others."""
    distance, weight, units = weigh(logits, peak, temperature)
    return tl.where((distance <= bound) & (weight >= min_p), units, 0)


@triton.jit
def _bound(bound_ptr, row, by_k, by_p, FILTERED: tl.constexpr):
    """The distance that settle found; where no filter asked for one, that within which weights are above 0."""
    bound = REACH
    if FILTERED:
        bound = tl.load(bound_ptr + row, mask=by_k | by_p, other=REACH)
    return bound


@triton.jit
def _weigh_chunks(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, peaks_ptr, bound_ptr, masses_ptr, C,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, FILTERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    temperature, _k, _p, by_k, by_p = filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V)
    min_p = tl.load(min_p_ptr + row)
    logits = tl.load(logits_ptr + row * stride + tokens, mask=tokens < V, other=float("-inf"))
    if PDL:
        tl.extra.cuda.gdc_wait()
    bound = _bound(bound_ptr, row, by_k, by_p, FILTERED)
    peak = candidate_logit(best_candidate(peaks_ptr, row, C, BLOCK_C))
    temperature, drawn = divisor(temperature, peak)
    if drawn:
        tl.store(masses_ptr + row * C + chunk, tl.sum(_kept(logits, peak, temperature, bound, min_p)))


@triton.jit
def _pick(
    logits_ptr, stride, V, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, peaks_ptr, bound_ptr,
    masses_ptr, out_ptr, C, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, FILTERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK_C)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    asked, _k, _p, by_k, by_p = filters_of(temperature_ptr, top_k_ptr, top_p_ptr, row, V)
    min_p, uniform = tl.load(min_p_ptr + row), tl.load(uniform_ptr + row)
    if PDL:
        tl.extra.cuda.gdc_wait()
    masses = tl.load(masses_ptr + row * C + chunks, mask=chunks < C, other=0)
    bound = _bound(bound_ptr, row, by_k, by_p, FILTERED)
    best = best_candidate(peaks_ptr, row, C, BLOCK_C)
    peak = candidate_logit(best)
    temperature, drawn = divisor(asked, peak)
    # Greedy rows, and those whose logits are no numbers: of the former, only NaN gives -1.
    token = tl.where(asked > 0.0, -1, candidate_token(best))
    if drawn:
        running = tl.cumsum(masses)
        total = tl.max(running)
        # A running sum of whole numbers passes a number when it passes its whole part; the last one always does.
        point = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
        chunk = tl.sum((running <= point).to(tl.int32))
        before = tl.max(tl.where(running <= point, running, 0))
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = tl.load(logits_ptr + row * stride + tokens, mask=tokens < V, other=float("-inf"))
        running = before + tl.cumsum(_kept(logits, peak, temperature, bound, min_p))
        token = tl.min(tl.where(running > point, tokens, _LAST)).to(tl.int64)
    tl.store(out_ptr + row, token)


def default_tile(T: int, V: int) -> SampleTile:
    """Programs for about two waves of a few rows; of many rows, larger ones, which repeat less between them."""
    chunk = min(max(triton.next_power_of_2(T * V // 256), 256), 4096)
    slice_ = min(max(triton.next_power_of_2(T * V // 512), 256), bounds.WIDEST_SLICE)
    warps = max(2, min(8, chunk // 256))
    return SampleTile(chunk, warps, slice_, slice_warps=max(4, min(8, slice_ // 256)))


def scratch_words(T: int, V: int, tile: SampleTile | None = None) -> int:
    """How many int64 `sample` needs as scratch for logits [T, V]."""
    return sum(_parts(T, V, tile or default_tile(T, V)))


def _parts(T: int, V: int, tile: SampleTile) -> tuple[int, ...]:
    """Words of peaks, depths and masses [T, C], of tally, of bound [T] and of found [T, room], both fp32."""
    C = triton.cdiv(V, tile.chunk)
    return T * C, T * C, T * C, T * bounds.tally_words(tile.rounds, tile.lanes), (T + 1) // 2, (T * tile.room + 1) // 2


def sample(
    logits: Tensor,
    params: SampleParams,
    out: Tensor,
    scratch: Tensor,
    *,
    filtered: bool = True,
    tile: SampleTile | None = None,
    pdl: bool = False,
) -> None:
    """A token of each row of logits [T, V], fp32, into out [T], int64, as kernels.sample.sample says; -1 if none.

    The rows may be apart (stride(0) > V), not the logits in a row. scratch: int64, at least scratch_words; its contents
    do not matter. filtered=False saves launches where no row has a top_k or a top_p: it heeds neither.

    Raises ValueError if V is too large for sums of 64 bits, above 500,000, or the scratch too small.
    """
    T, V = logits.shape
    if V > _MOST_TOKENS:
        raise ValueError(f"logits have {V} columns; at most {_MOST_TOKENS} can be summed.")
    if T == 0:
        return
    tile = tile or default_tile(T, V)
    C = triton.cdiv(V, tile.chunk)
    peaks, depths, masses, tally, bound, found = carve(scratch, *_parts(T, V, tile))
    bound, found = bound.view(torch.float32), found.view(torch.float32)
    words = tally.numel() // T
    rows = (logits, logits.stride(0), V)
    filters = (params.temperature, params.top_k, params.top_p)
    launch = {"PDL": pdl, "launch_pdl": pdl}
    by_chunk = {"CHUNK": tile.chunk, "num_warps": tile.chunk_warps, **launch}
    block_c = triton.next_power_of_2(C)
    _survey[(C, T)](*rows, peaks, depths, tally, C, words, BLOCK_WORDS=triton.next_power_of_2(words), **by_chunk)
    if filtered:
        known = (*rows, *filters)
        spans = {"ROUNDS": tile.rounds, "LANES": tile.lanes, **launch}
        by_slice = {"SLICE": tile.slice, "ENOUGH": tile.enough, "num_warps": tile.slice_warps, **spans}
        slices = (triton.cdiv(V, tile.slice), T)
        for i in range(tile.rounds):
            bounds.narrow[slices](*known, peaks, depths, tally, C, words, ROUND=i, BLOCK_C=block_c, **by_slice)
        bounds.collect[slices](*known, tally, found, words, ROOM=tile.room, **by_slice)
        bounds.settle[(T,)](
            *known, tally, found, bound, words, ROOM=tile.room, BLOCK=tile.block, num_warps=tile.row_warps, **spans
        )
    ends = {"FILTERED": filtered, "BLOCK_C": block_c, **by_chunk}
    _weigh_chunks[(C, T)](*rows, *filters, params.min_p, peaks, bound, masses, C, **ends)
    _pick[(T,)](*rows, *filters, params.min_p, params.uniform, peaks, bound, masses, out, C, **ends)
