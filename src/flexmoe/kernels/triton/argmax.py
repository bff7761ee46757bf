"""The most likely token of each row, in two launches. Enters: logits [T, V]. Leaves: tokens int64 [T].

Where ranks share the vocabulary, each finds the `best` of its own logits, and `winner` the best of the ranks' best.

A logit and its token make one integer whose order is "larger logit, then lower token"; so a maximum is all there is to
compute, it is the same in any order, and a row's token does not depend on tiles or on the batch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_NAN_KEY = tl.constexpr(0x7FFFFFFF)
_TOKEN_BITS = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-(2**63))


@dataclass(frozen=True, slots=True)
class ArgmaxTile:
    """chunk: logits of a program of the first launch, a power of two. row_warps: of the second, a program a row."""

    chunk: int = 1024
    num_warps: int = 4
    row_warps: int = 1


@triton.jit
def ordered_key(x):
    """fp32 -> int32 in the order of the numbers; -0 equals 0, and NaN is the largest, as argmax has it."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN_KEY)


@triton.jit
def number(key):
    """The fp32 number of an ordered key; of NaN's, NaN."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def candidates(logits, tokens):
    """One int64 each; the largest is the most likely token, of equal ones the lowest."""
    return (ordered_key(logits).to(tl.int64) << 32) | (tokens ^ _TOKEN_BITS)


@triton.jit
def candidate_logit(candidate):
    """The logit of a candidate: fp32."""
    return number((candidate >> 32).to(tl.int32))


@triton.jit
def candidate_token(candidate):
    """The token of a candidate; -1 if its logit is NaN: int64."""
    token = (candidate & _TOKEN_BITS) ^ _TOKEN_BITS
    return tl.where((candidate >> 32) == _NAN_KEY, -1, token)


@triton.jit
def best_candidate(peaks_ptr, row, C, BLOCK_C: tl.constexpr):
    """The best of the C chunks of a row, of peaks [T, C]: int64."""
    chunks = tl.arange(0, BLOCK_C)
    return tl.max(tl.load(peaks_ptr + row.to(tl.int64) * C + chunks, mask=chunks < C, other=LOWEST))


@triton.jit
def _peaks(logits_ptr, stride, V, first, peaks_ptr, C, CHUNK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    logits = tl.load(logits_ptr + row * stride + tokens, mask=tokens < V, other=float("-inf"))
    tl.store(peaks_ptr + row * C + chunk, tl.max(candidates(logits.to(tl.float32), first + tokens)))


@triton.jit
def _first(peaks_ptr, out_ptr, C, BLOCK_C: tl.constexpr, TOKEN: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    best = best_candidate(peaks_ptr, row, C, BLOCK_C)
    tl.store(out_ptr + row, candidate_token(best) if TOKEN else best)


@triton.jit
def _winner(best_ptr, out_ptr, T, P, BLOCK_P: tl.constexpr):
    row = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)
    tl.store(out_ptr + row, candidate_token(tl.max(tl.load(best_ptr + p * T + row, mask=p < P, other=LOWEST))))


def default_tile(T: int, V: int) -> ArgmaxTile:
    """Chunks small enough that a few rows fill the device, large enough that many do not drown it in programs."""
    chunk = min(max(triton.next_power_of_2(T * V // 256), 256), 4096)
    C = triton.cdiv(V, chunk)
    return ArgmaxTile(chunk, num_warps=max(1, min(8, chunk // 256)), row_warps=1 if C <= 256 else 4)


def scratch_words(T: int, V: int, tile: ArgmaxTile | None = None) -> int:
    """How many int64 `greedy` needs as scratch for logits [T, V]."""
    return T * -(-V // (tile or default_tile(T, V)).chunk)


def greedy(logits: Tensor, out: Tensor, scratch: Tensor, *, tile: ArgmaxTile | None = None, pdl: bool = False) -> None:
    """The argmax of each row of logits [T, V] into out [T], int64: of equal logits the lowest, -1 if one is NaN.

    The rows may be apart (stride(0) > V), not the logits in a row. scratch: int64, at least scratch_words; its contents
    do not matter.
    """
    _launch(logits, out, scratch, 0, tile, token=True, pdl=pdl)


def best(
    logits: Tensor, out: Tensor, scratch: Tensor, *, first: int, tile: ArgmaxTile | None = None, pdl: bool = False
) -> None:
    """As `greedy` of logits whose first one is of token `first`, but `winner` is to read what it leaves."""
    _launch(logits, out, scratch, first, tile, token=False, pdl=pdl)


def winner(candidates: Tensor, out: Tensor) -> None:
    """The token of each row, int64 [T], from what P ranks found to be `best`, int64 [P, T], contiguous."""
    P, T = candidates.shape
    _winner[(T,)](candidates, out, T, P, BLOCK_P=triton.next_power_of_2(P), num_warps=1)


def _launch(
    logits: Tensor, out: Tensor, scratch: Tensor, first: int, tile: ArgmaxTile | None, *, token: bool, pdl: bool
) -> None:
    T, V = logits.shape
    if T == 0:
        return
    tile = tile or default_tile(T, V)
    C = triton.cdiv(V, tile.chunk)
    peaks = carve(scratch, T * C)[0]
    _peaks[(C, T)](
        logits, logits.stride(0), V, first, peaks, C, CHUNK=tile.chunk, PDL=pdl, num_warps=tile.num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    _first[(T,)](
        peaks, out, C, BLOCK_C=triton.next_power_of_2(C), TOKEN=token, PDL=pdl, num_warps=tile.row_warps,
        launch_pdl=pdl,
    )  # fmt: skip


def carve(scratch: Tensor, *words: int) -> tuple[Tensor, ...]:
    """The first so many words of scratch, the next so many, and so on. Raises ValueError if it is too small."""
    if scratch.dtype != torch.int64 or scratch.numel() < sum(words):
        raise ValueError(f"scratch holds {scratch.numel()} of {scratch.dtype}; give {sum(words)} of torch.int64.")
    return tuple(torch.split(scratch.flatten()[: sum(words)], list(words)))
