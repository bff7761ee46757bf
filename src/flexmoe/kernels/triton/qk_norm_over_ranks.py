"""Norm of queries and keys over all heads of a token, of which each rank holds some.

Enters: this rank's rows [T, q + 2 kv]. Leaves: the rows, their queries and keys normed in place. Of few rows in one
launch, by memory for two sums a row that the other ranks can read: a program takes a row, as in `all_reduce.py`, whose
rules for memory hold here. Of many in two, between which the ranks add up the sums: `sum_squares`, `norm_by_sums`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmoe.kernels.decode_attention import QKNormWeights
from flexmoe.kernels.triton.all_reduce import PeerRows, tell_and_wait


@triton.jit
def _scaled(x, mean, eps, weight):
    """x fp32, rounded to weight's dtype before the product."""
    return (x * tl.rsqrt(mean + eps)).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _heads(rows_ptr, row, q, k, width, Q: tl.constexpr, KV: tl.constexpr):
    """A row's queries and keys, fp32."""
    query = tl.load(rows_ptr + row * width + q, mask=q < Q, other=0.0)
    key = tl.load(rows_ptr + row * width + Q + k, mask=k < KV, other=0.0)
    return query.to(tl.float32), key.to(tl.float32)


@triton.jit
def _leave_sums(sums_ptr, row, query, key):
    """Their squares, added up."""
    tl.store(sums_ptr + row * 2, tl.sum(query * query, 0))
    tl.store(sums_ptr + row * 2 + 1, tl.sum(key * key, 0))


@triton.jit
def _leave_normed(
    rows_ptr, row, q, k, width, query, key, query_mean, key_mean, query_weight, key_weight,
    Q: tl.constexpr, KV: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """A row's queries and keys where they were, normed by these means of squares."""
    element = rows_ptr.dtype.element_ty
    normed_query = _scaled(query, query_mean, EPS, query_weight).to(element)
    normed_key = _scaled(key, key_mean, EPS, key_weight).to(element)
    tl.store(rows_ptr + row * width + q, normed_query, mask=q < Q)
    tl.store(rows_ptr + row * width + Q + k, normed_key, mask=k < KV)


@triton.jit
def _mean(addresses, row, part_ptr, valid, columns):
    """Over all ranks, of the squares whose sums they left at `row`."""
    found = tl.load(addresses.to(part_ptr.dtype) + row, mask=valid, other=0.0, volatile=True)
    return tl.sum(found, 0) / columns


@triton.jit
def _qk_norm(
    part_ptr, parts_ptr, flags_ptr, rows_ptr, query_weight_ptr, key_weight_ptr, rows, width,
    Q: tl.constexpr, KV: tl.constexpr, EPS: tl.constexpr, RANK: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    q, k = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    query_weight = tl.load(query_weight_ptr + q, mask=q < Q, other=0.0)
    key_weight = tl.load(key_weight_ptr + k, mask=k < KV, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    query, key = _heads(rows_ptr, row, q, k, width, Q, KV)
    _leave_sums(part_ptr, row, query, key)
    tl.debug_barrier()  # other threads tell
    tell_and_wait(flags_ptr, row, rows, RANK, P, BLOCK_P)
    peers = tl.arange(0, BLOCK_P)
    addresses = tl.load(parts_ptr + peers, mask=peers < P, other=0)
    query_mean = _mean(addresses, row * 2, part_ptr, peers < P, P * Q)
    key_mean = _mean(addresses, row * 2 + 1, part_ptr, peers < P, P * KV)
    _leave_normed(
        rows_ptr, row, q, k, width, query, key, query_mean, key_mean, query_weight, key_weight, Q, KV, EPS
    )  # fmt: skip


@triton.jit
def _sum_squares(
    rows_ptr, sums_ptr, width, Q: tl.constexpr, KV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr
):  # fmt: skip
    """Grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    q, k = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    query, key = _heads(rows_ptr, row, q, k, width, Q, KV)
    _leave_sums(sums_ptr, row, query, key)


@triton.jit
def _norm_by_sums(
    rows_ptr, sums_ptr, query_weight_ptr, key_weight_ptr, width,
    Q: tl.constexpr, KV: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    q, k = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    query_weight = tl.load(query_weight_ptr + q, mask=q < Q, other=0.0)
    key_weight = tl.load(key_weight_ptr + k, mask=k < KV, other=0.0)
    query, key = _heads(rows_ptr, row, q, k, width, Q, KV)
    query_mean, key_mean = tl.load(sums_ptr + row * 2) / (P * Q), tl.load(sums_ptr + row * 2 + 1) / (P * KV)
    _leave_normed(
        rows_ptr, row, q, k, width, query, key, query_mean, key_mean, query_weight, key_weight, Q, KV, EPS
    )  # fmt: skip


def sum_squares(rows: Tensor, norm: QKNormWeights) -> Tensor:
    """Of rows [T, q + 2 kv], contiguous, the squares of queries and of keys: fp32 [T, 2]."""
    T, width = rows.shape
    sums = torch.empty(T, 2, dtype=torch.float32, device=rows.device)
    _sum_squares[(T,)](rows, sums, width, **_blocks(norm))
    return sums


def norm_by_sums(rows: Tensor, sums: Tensor, norm: QKNormWeights, ranks: int) -> None:
    """Norms the queries and keys of rows [T, q + 2 kv], contiguous, in place.

    sums: what `sum_squares` gives, added up over so many ranks that each hold as many columns. norm: weights of this
    rank's.
    """
    T, width = rows.shape
    _norm_by_sums[(T,)](rows, sums, norm.query, norm.key, width, EPS=norm.eps, P=ranks, **_blocks(norm))


def _blocks(norm: QKNormWeights) -> dict[str, int]:
    q, kv = len(norm.query), len(norm.key)
    block_q = triton.next_power_of_2(q)
    return {
        "Q": q, "KV": kv, "BLOCK_Q": block_q, "BLOCK_KV": triton.next_power_of_2(kv),
        "num_warps": max(1, min(8, block_q // 256)),
    }  # fmt: skip


def qk_norm_over_ranks(peers: PeerRows, rows: Tensor, norm: QKNormWeights, *, pdl: bool = False) -> None:
    """Norms the queries and keys of rows [T, q + 2 kv], contiguous, by means over all ranks' columns.

    peers: rows of two fp32 each. norm: weights of this rank's q and kv columns. All ranks launch this for the same T.
    """
    (T, width), P = rows.shape, peers.size
    _qk_norm[(T,)](
        peers.part, peers.parts, peers.flags, rows, norm.query, norm.key, len(peers.part), width,
        EPS=norm.eps, RANK=peers.rank, P=P, BLOCK_P=triton.next_power_of_2(P), PDL=pdl, launch_pdl=pdl, **_blocks(norm),
    )  # fmt: skip
