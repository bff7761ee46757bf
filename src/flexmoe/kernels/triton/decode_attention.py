"""Attention of a decode step over the paged KV cache, in two launches: split and merge.

Enters: the raw projection of T rows that are each the newest token of a sequence, and one layer's cache. Leaves: the
attention of every row, and its new key and value in the cache.

The keys of a row are divided into at most S splits; each (head or heads of a key head, split, row) is a
program (flash-decoding, Dao et al., 2023). Norm, clip and rotary embedding happen in it, from the raw projection. The
row's last split takes the new key and value from registers and writes them to the cache; no program reads that slot,
so there is no race. The merge weighs the splits by their sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from flexmoe.kernels.decode_attention import DecodeRows, QKNormWeights
from flexmoe.kernels.triton.decode_attention_kernels import FULL_NORM, HEAD_NORM, NO_NORM, merge_kernel, split_kernel

_LOG2_E = 1.4426950408889634
_MIN_DOT = 16  # rows of the smallest tensor-core product
_MAX_SPLITS = 128


@dataclass(frozen=True, slots=True)
class DecodeAttentionTile:
    """How the work is cut.

    keys: keys of a tile, a power of two >= 16. num_stages: 1 holds the next tile in registers while this one is
    computed; more leave it to the compiler's pipeline through shared memory, where looking up slots takes stages too,
    so that 3, 5, 7 have 1, 2, 3 tiles in flight. splits: S, at most 128; with 1 there is no merge. min_split: keys that
    a split takes at least, a multiple of `keys`. per_head: a program computes one query head with multiply-adds (if
    several share a key head, each reads it, from L2); else all of a key head together, on tensor cores.
    """

    keys: int = 32
    num_warps: int = 4
    num_stages: int = 1
    splits: int = 1
    min_split: int = 64
    per_head: bool = False
    merge_warps: int = 4


def default_tile(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sm_count: int = 132,
    dtype: torch.dtype = torch.bfloat16,
) -> DecodeAttentionTile:
    """Splits that give most SMs a program, and tiles of about 8 KB of keys, half of that where there are many programs.

    Heads are computed one by one where there is nothing to share, and in fp32, which tensor cores would round. For
    sequences of about 200 keys; see `for_long` for others.
    """
    per_head = num_heads == num_kv_heads or dtype is torch.float32
    programs = batch * (num_heads if per_head else num_kv_heads)
    splits = 1
    wanted = 2 * sm_count if batch <= 2 else 3 * sm_count // 4  # a merge costs more beside other rows' work
    while splits < 16 and programs * splits < wanted:
        splits *= 2
    most = 8192 if programs <= 3 * sm_count else 4096
    keys = min(64, max(16, most // (triton.next_power_of_2(head_dim) * dtype.itemsize)))
    return DecodeAttentionTile(keys=keys, splits=splits, min_split=keys, per_head=per_head)


def for_long(tile: DecodeAttentionTile) -> DecodeAttentionTile:
    """The tile for sequences of thousands of keys: more splits, whose merge is then worth its launch."""
    return replace(tile, splits=min(64, 4 * tile.splits), min_split=max(64, tile.min_split))


def workspace_shapes(
    batch: int, num_heads: int, head_dim: int, splits: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int]]:
    """Shapes of the workspace: outputs [T, Hq, S, D] and log-sums [T, Hq, S] of the splits, both fp32."""
    return (batch, num_heads, splits, head_dim), (batch, num_heads, splits)


def decode_attention(
    qkv: Tensor,
    cache: Tensor,
    rows: DecodeRows,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    *,
    norm: QKNormWeights | None = None,
    clip: float | None = None,
    window: int | None = None,
    workspace: tuple[Tensor, Tensor] | None = None,
    tile: DecodeAttentionTile | None = None,
    pdl: bool = False,
) -> None:
    """Norm, clip, rotate, write the cache, attend; arguments as in `flexmoe.kernels.decode_attention`.

    All tensors contiguous. workspace: at least as large as `workspace_shapes`, needed if tile.splits > 1; all layers
    may share it. pdl: the rows, cos, sin, the norms' weights and all keys but the newest are read before the wait for
    earlier kernels; so they must be complete before the first of a chain of such launches starts.
    """
    num_rows, (num_kv_heads, head_dim) = qkv.shape[0], cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    tile = tile or default_tile(num_rows, num_heads, num_kv_heads, head_dim, dtype=qkv.dtype)
    assert 1 <= tile.splits <= _MAX_SPLITS
    assert tile.min_split % tile.keys == 0
    assert rows.block_size & (rows.block_size - 1) == 0
    assert all(t.is_contiguous() for t in (qkv, cache, cos, sin, out))
    heads = 1 if tile.per_head else num_heads // num_kv_heads
    common = {
        "HQ": num_heads, "D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "WINDOW": window,
        "SPLITS": tile.splits, "MIN_SPLIT": tile.min_split, "KEYS": tile.keys, "PDL": pdl, "launch_pdl": pdl,
    }  # fmt: skip
    partial, logsum = _checked(workspace, num_rows, num_heads, head_dim, tile.splits)
    split_kernel[(num_heads // heads, tile.splits, num_rows)](
        qkv, cache, rows.lengths, rows.tables, rows.table_stride, cos, sin,
        norm and norm.query, norm and norm.key, out, partial, logsum,
        HKV=num_kv_heads, R=2 * cos.shape[1], BLOCK_SIZE=rows.block_size,
        NORM=norm_kind(norm), EPS=norm.eps if norm else 0.0, CLIP=clip, SCALE=head_dim**-0.5 * _LOG2_E,
        PER_HEAD=tile.per_head, HEADS=heads,
        PAD_HEADS=1 if tile.per_head else max(_MIN_DOT, triton.next_power_of_2(heads)), STAGES=tile.num_stages,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **common,
    )  # fmt: skip
    if tile.splits > 1:
        merge_kernel[(num_heads, num_rows)](
            partial, logsum, rows.lengths, out, BLOCK_S=triton.next_power_of_2(tile.splits),
            num_warps=tile.merge_warps, **common,
        )  # fmt: skip


def norm_kind(norm: QKNormWeights | None) -> int:
    kind = NO_NORM if norm is None else FULL_NORM if norm.full else HEAD_NORM
    return int(kind.value)


def _checked(workspace: tuple[Tensor, Tensor] | None, *shape: int) -> tuple[Tensor | None, Tensor | None]:
    """The workspace, if it is needed and large enough."""
    if shape[-1] == 1:
        return None, None
    assert workspace is not None, "splits leave their parts in a workspace"
    for tensor, wanted in zip(workspace, workspace_shapes(*shape), strict=True):
        assert tensor.is_contiguous()
        assert tensor.dtype is torch.float32
        assert tensor.numel() >= math.prod(wanted)
    return workspace
