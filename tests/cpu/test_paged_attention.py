"""paged_attention: each kind of group against a softmax over keys picked one by one. Slots nobody sees hold NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexmoe.kernels.paged_attention import DecodeGroup, PrefillSpan, paged_attention
from tests.cpu.nearness import assert_near, poisoned
from tests.cpu.paging import naive_attention

SLOTS, D = 64, 16
HEADS = [(4, 4), (6, 2), (5, 1)]  # multi-head, grouped, one key head for all
heads = pytest.mark.parametrize("heads", HEADS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

Keys = list[list[int]]  # for each row of the batch, the slots it sees


def cache_of(keys: Keys, num_kv: int, dtype: torch.dtype) -> Tensor:
    """Random where a row looks, NaN everywhere else."""
    cache = torch.full((SLOTS, 2, num_kv, D), float("nan"), dtype=dtype)
    used = sorted({slot for row in keys for slot in row})
    cache[used] = torch.randn(len(used), 2, num_kv, D).to(dtype)
    return cache


def check(groups: list[DecodeGroup | PrefillSpan], keys: Keys, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """The groups' rows together attend as if each picked its keys by hand."""
    num_heads, num_kv = heads
    cache = cache_of(keys, num_kv, dtype)
    # The layer's queries are part of a wider tensor.
    query = torch.randn(len(keys), num_heads + num_kv, D).to(dtype)[:, :num_heads]
    before = (query.clone(), cache.clone())
    with poisoned(), torch.inference_mode():
        out = paged_attention(query, cache, groups)
    wanted = [naive_attention(q, cache[row, 0], cache[row, 1]) for q, row in zip(query, keys, strict=True)]
    assert (out.dtype, out.is_contiguous()) == (dtype, True)
    assert_near(out, torch.stack(wanted))
    assert torch.equal(query, before[0])
    assert torch.equal(cache.nan_to_num(), before[1].nan_to_num())


def slots(*ranges: tuple[int, int]) -> list[int]:
    return [slot for start, stop in ranges for slot in range(start, stop)]


@heads
@dtypes
@pytest.mark.parametrize("count", [1, 2, 17, 50])
def test_decode_of_one_row_in_place(count: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check([DecodeGroup(slice(0, 1), slice(5, 5 + count), None)], [slots((5, 5 + count))], heads, dtype)


@heads
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_decode_gathered(rows: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    keys = [torch.randperm(SLOTS)[:9].tolist() for _ in range(rows)]
    check([DecodeGroup(slice(0, rows), torch.tensor(keys), None)], keys, heads, dtype)


@heads
@dtypes
def test_decode_gathered_with_mixed_lengths(heads: tuple[int, int], dtype: torch.dtype) -> None:
    lengths = [1, 12, 7, 3]
    keys = [torch.randperm(SLOTS)[:n].tolist() for n in lengths]
    table = torch.tensor([row + [row[0]] * (12 - len(row)) for row in keys])
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    check([DecodeGroup(slice(0, 4), table, mask[:, None, None])], keys, heads, dtype)


@heads
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 13])
def test_prefill_without_prefix(rows: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    keys = [slots((20, 21 + row)) for row in range(rows)]
    check([PrefillSpan(slice(0, rows), slice(20, 20 + rows), None)], keys, heads, dtype)
    moved = torch.randperm(SLOTS)[:rows]
    keys = [moved[: row + 1].tolist() for row in range(rows)]
    check([PrefillSpan(slice(0, rows), moved, None)], keys, heads, dtype)


@heads
@dtypes
@pytest.mark.parametrize(("rows", "prefix", "window"), [(4, 9, None), (1, 6, None), (7, 3, 4), (5, 0, 2), (6, 2, 1)])
def test_prefill_with_prefix_and_window(
    rows: int, prefix: int, window: int | None, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    total = prefix + rows
    query, key = torch.arange(prefix, total)[:, None], torch.arange(total)
    mask = (key <= query) & (key > query - (window or total))
    visible = mask.any(0)  # the keys that any row sees
    mask = mask[:, visible]
    in_a_row = torch.arange(30, 30 + total)[visible]
    scattered = torch.randperm(SLOTS)[: len(in_a_row)]
    in_place = slice(int(in_a_row[0]), int(in_a_row[-1]) + 1)
    for places, keys in ((in_a_row, in_place), (in_a_row, in_a_row), (scattered, scattered)):
        check([PrefillSpan(slice(0, rows), keys, mask)], [places[row].tolist() for row in mask], heads, dtype)


@heads
@dtypes
def test_all_kinds_in_one_batch(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Groups fill their own rows only, and may share keys: a common prefix lies in the cache once."""
    gathered = [[3, 4, 9], [3, 4, 40]]
    prefix, own = slots((3, 5)), slots((50, 53))
    keys = [slots((3, 12)), *gathered, [50], [50, 51], [50, 51, 52], prefix + own[:1], prefix + own[:2]]
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    groups: list[DecodeGroup | PrefillSpan] = [
        DecodeGroup(slice(0, 1), slice(3, 12), None),
        DecodeGroup(slice(1, 3), torch.tensor(gathered), None),
        PrefillSpan(slice(3, 6), slice(50, 53), None),
        PrefillSpan(slice(6, 8), torch.tensor([3, 4, 50, 51]), mask),
    ]
    check(groups, keys, heads, dtype)


def test_scores_are_scaled_by_the_root_of_the_head_size() -> None:
    cache = torch.zeros(2, 2, 1, 4)
    cache[1, 0, 0], cache[1, 1, 0] = 1.0, torch.tensor([1.0, 2.0, 3.0, 4.0])
    out = paged_attention(torch.ones(1, 1, 4), cache, [DecodeGroup(slice(0, 1), slice(0, 2), None)])
    second = torch.tensor(2.0).exp() / (1 + torch.tensor(2.0).exp())  # 4 / sqrt(4)
    torch.testing.assert_close(out[0, 0], cache[1, 1, 0] * second)
