"""Queries, keys and values on their way to attention, against torch."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels import rotate_and_store as reference
from flexmoe.kernels.decode_attention import QKNormWeights
from flexmoe.kernels.triton.rotate_and_store import rotate_and_store
from tests.kernels.support import DEVICE, DTYPES, Guarded, assert_near, normal

SHAPES = [(1, 4, 2, 32, 32), (5, 6, 3, 16, 8), (3, 9, 9, 24, 24), (7, 8, 1, 64, 32)]  # T, Hq, Hkv, D, R
POSITIONS = 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "head", "full", "clip"])
@pytest.mark.parametrize(("T", "heads", "kv_heads", "dim", "rotated"), SHAPES)
def test_queries_and_the_cache_are_those_of_torch(
    T: int, heads: int, kv_heads: int, dim: int, rotated: int, kind: str, dtype: torch.dtype
) -> None:
    qkv = normal(T, (heads + 2 * kv_heads) * dim, dtype=dtype)
    before = normal(T + 9, 2, kv_heads, dim, dtype=dtype)
    cos, sin = normal(POSITIONS, rotated // 2), normal(POSITIONS, rotated // 2)
    positions = torch.randint(0, POSITIONS, (T,), dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(T + 9, device=DEVICE)[:T].int()
    slots[T // 2 :: 3] = -1  # padding
    sizes = (heads * dim, kv_heads * dim) if kind == "full" else (dim, dim)
    weights = [normal(size, dtype=dtype) for size in sizes]
    norm = QKNormWeights(*weights, 1e-5, full=kind == "full") if kind in ("head", "full") else None
    clip = 0.7 if kind == "clip" else None
    expected_cache, cache, out = before.clone(), before.clone(), Guarded(T, heads * dim, dtype=dtype)
    given = qkv.clone()
    expected = reference.rotate_and_store(qkv, expected_cache, positions, slots, cos, sin, norm=norm, clip=clip)
    fresh = Guarded(T, 2, kv_heads, dim, dtype=dtype)
    rotate_and_store(qkv, cache, positions, slots, cos, sin, out.tensor, norm=norm, clip=clip, fresh=fresh.tensor)
    assert_near(out.check(), expected, dtype)
    assert_near(cache, expected_cache, dtype)
    kept = slots >= 0
    assert torch.equal(fresh.check()[kept], cache[slots[kept].long()])
    without = before.clone()
    rotate_and_store(qkv, without, positions, slots, cos, sin, out.tensor, norm=norm, clip=clip)
    assert torch.equal(without, cache)
    untouched = torch.ones(T + 9, dtype=torch.bool, device=DEVICE).index_fill(0, slots[slots >= 0].long(), False)
    assert torch.equal(cache[untouched], before[untouched])
    assert torch.equal(qkv, given)
