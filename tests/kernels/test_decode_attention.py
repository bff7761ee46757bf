"""Decode attention against plain torch: every form of head, norm, window and split; what may not be read or written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flexmoe.config.model import AttentionConfig, LayerConfig, ModelConfig, QKNorm, RopeConfig
from flexmoe.kernels import decode_attention as reference
from flexmoe.kernels.decode_attention import DecodeRows, QKNormWeights
from flexmoe.kernels.paged_attention import DecodeGroup
from flexmoe.layers.attention import Attention
from flexmoe.layers.forward_batch import ForwardBatch
from flexmoe.layers.rotary import Rotary, inverse_frequencies
from tests.kernels.support import DEVICE, DTYPES, ON_GPU, Guarded, assert_near, normal, poisoned

pytest.importorskip("triton", reason="the kernels are written in Triton")
from flexmoe.kernels.triton.decode_attention import (
    DecodeAttentionTile,
    decode_attention,
    default_tile,
    workspace_shapes,
)

# Triton's interpreter turns arrays of one element into loop bounds in a way that numpy will drop.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")

LENGTHS = (33, 0, 1, 18)
SPLIT = DecodeAttentionTile(keys=16, splits=3, min_split=16)
WHOLE = DecodeAttentionTile(keys=16, splits=1, min_split=16)


@dataclass(frozen=True)
class Heads:
    """The sizes of one layer's attention."""

    queries: int
    keys: int
    dim: int
    rotary: int


@dataclass
class Inputs:
    """What one call reads; cache slots that it may not read hold NaN."""

    qkv: Tensor
    cache: Tensor
    rows: DecodeRows
    cos: Tensor
    sin: Tensor

    def head_norm(self) -> QKNormWeights:
        dim = self.cache.shape[3]
        return QKNormWeights(normal(dim, dtype=self.qkv.dtype), normal(dim, dtype=self.qkv.dtype), 1e-5, full=False)

    def full_norm(self) -> QKNormWeights:
        key_size = self.cache.shape[2] * self.cache.shape[3]
        query_size = self.qkv.shape[1] - 2 * key_size
        dtype = self.qkv.dtype
        return QKNormWeights(normal(query_size, dtype=dtype), normal(key_size, dtype=dtype), 1e-5, full=True)


def make(heads: Heads, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS, block_size: int = 16) -> Inputs:
    """Random rows of these lengths over shuffled blocks. Unused table entries name a block of NaN."""
    blocks = [-(-length // block_size) for length in lengths]
    stride = max(blocks) + 2
    order = torch.randperm(sum(blocks)).tolist()
    cache = poisoned((len(order) + 1) * block_size, 2, heads.keys, heads.dim, dtype=dtype)
    tables = torch.full((len(lengths) * stride,), len(order), dtype=torch.int32)
    for t, length in enumerate(lengths):
        mine = torch.tensor([order.pop() for _ in range(blocks[t])], dtype=torch.int64)
        tables[t * stride : t * stride + blocks[t]] = mine
        earlier = torch.arange(max(length - 1, 0))
        slots = (mine[earlier // block_size] * block_size + earlier % block_size).to(DEVICE)
        cache[slots] = normal(len(slots), 2, heads.keys, heads.dim, dtype=dtype)
    qkv = normal(len(lengths), (heads.queries + 2 * heads.keys) * heads.dim, dtype=dtype)
    qkv[[t for t, length in enumerate(lengths) if length == 0]] = torch.nan
    rows = DecodeRows(
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        tables=tables.to(DEVICE),
        table_stride=torch.tensor([stride], dtype=torch.int32, device=DEVICE),
        block_size=block_size,
    )
    angles = torch.rand(max(lengths), heads.rotary // 2, device=DEVICE) * 6.3
    return Inputs(qkv, cache, rows, angles.cos(), angles.sin())


def launch(
    given: Inputs,
    tile: DecodeAttentionTile,
    norm: QKNormWeights | None = None,
    clip: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels' output and cache, with outputs and workspace poisoned."""
    cache, (num_kv_heads, dim) = given.cache.clone(), given.cache.shape[2:]
    batch, width = given.qkv.shape[0], given.qkv.shape[1] - 2 * num_kv_heads * dim
    partial, logsum = workspace_shapes(batch, width // dim, dim, tile.splits)
    out, workspace = Guarded(batch, width, dtype=given.qkv.dtype), (Guarded(*partial), Guarded(*logsum))
    decode_attention(
        given.qkv, cache, given.rows, given.cos, given.sin, out.tensor, norm=norm, clip=clip, window=window,
        workspace=(workspace[0].tensor, workspace[1].tensor), tile=tile,
    )  # fmt: skip
    for part in workspace:
        part.check()
    return out.check(), cache


def check(
    given: Inputs,
    tile: DecodeAttentionTile,
    norm: QKNormWeights | None = None,
    clip: float | None = None,
    window: int | None = None,
) -> None:
    """Compare output and cache with the reference; other slots than the newest must stay as they were."""
    dtype = given.qkv.dtype
    expected, cache = torch.full_like(given.qkv, torch.nan)[:, : _query_size(given)], given.cache.clone()
    reference.decode_attention(
        given.qkv, cache, given.rows, given.cos, given.sin, expected, norm=norm, clip=clip, window=window
    )
    out, written = launch(given, tile, norm, clip, window)
    assert_near(out, expected, dtype)
    assert torch.equal(written.isnan(), cache.isnan())
    assert_near(written.nan_to_num(), cache.nan_to_num(), dtype)
    old = ~given.cache.isnan()
    assert torch.equal(written[old], given.cache[old])
    assert not out[given.rows.lengths == 0].any()


def _query_size(given: Inputs) -> int:
    return given.qkv.shape[1] - 2 * given.cache.shape[2] * given.cache.shape[3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(2, 2, 16, 16),
        Heads(4, 2, 32, 16),
        Heads(3, 1, 80, 80),
        Heads(2, 1, 96, 40),
        Heads(1, 1, 256, 256),
    ],
    ids=str,
)
def test_heads_of_all_sizes(heads: Heads, per_head: bool, tile: DecodeAttentionTile, dtype: torch.dtype) -> None:
    check(make(heads, dtype), replace(tile, per_head=per_head))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [16, 17])
def test_many_queries_share_a_key_head(queries: int, dtype: torch.dtype) -> None:
    check(make(Heads(queries, 1, 16, 16), dtype, (1, 33)), SPLIT)


def test_all_lengths_around_tiles_and_splits() -> None:
    check(make(Heads(1, 1, 16, 16), DTYPES[0], (2, 15, 16, 17, 31, 32, 47, 48, 49, 64, 97)), SPLIT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("full", [True, False], ids=["full", "head"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_norm_and_clip(full: bool, clip: float | None, per_head: bool, dtype: torch.dtype) -> None:
    given = make(Heads(3, 1, 32, 32), dtype, (0, 18))
    check(given, replace(SPLIT, per_head=per_head), given.full_norm() if full else given.head_norm(), clip)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_without_norm(dtype: torch.dtype) -> None:
    check(make(Heads(2, 2, 16, 16), dtype, (18,)), SPLIT, clip=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("window", [1, 16, 20, 1000])
def test_windows(window: int, tile: DecodeAttentionTile, dtype: torch.dtype) -> None:
    check(make(Heads(2, 1, 16, 16), dtype), tile, window=window)


@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_block_sizes(block_size: int) -> None:
    check(make(Heads(2, 2, 16, 16), DTYPES[0], block_size=block_size), SPLIT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("change", [{"num_stages": 3}, {"keys": 32, "min_split": 32}, {"splits": 8}], ids=str)
def test_other_tiles(change: dict[str, int], per_head: bool, dtype: torch.dtype) -> None:
    check(make(Heads(2, 1, 16, 16), dtype, (150, 0, 33)), replace(SPLIT, per_head=per_head, **change))


@pytest.mark.parametrize("per_head", [True, False])
def test_bits_stay_the_same_run_after_run_and_alone(per_head: bool) -> None:
    given, tile = make(Heads(2, 1, 32, 32), DTYPES[-1]), replace(SPLIT, per_head=per_head)
    out, cache = launch(given, tile)
    again, cache_again = launch(given, tile)
    assert torch.equal(out, again)
    assert torch.equal(cache.nan_to_num(), cache_again.nan_to_num())
    last = len(LENGTHS) - 1
    tables = given.rows.tables[last * int(given.rows.table_stride) :]
    alone = replace(
        given, qkv=given.qkv[last:], rows=replace(given.rows, lengths=given.rows.lengths[last:], tables=tables)
    )
    assert torch.equal(launch(alone, tile)[0][0], out[last])


@pytest.mark.skipif(not ON_GPU, reason="graphs and dependent launches need a GPU")
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("splits", [1, 4])
def test_graph_of_dependent_launches_equals_eager(splits: int, per_head: bool) -> None:
    given = make(Heads(8, 2, 128, 128), torch.bfloat16, (700, 0, 1, 64))
    tile = DecodeAttentionTile(splits=splits, per_head=per_head)
    expected, cache = launch(given, tile)
    shapes = workspace_shapes(4, 8, 128, splits)
    workspace, out = (poisoned(*shapes[0]), poisoned(*shapes[1])), torch.empty_like(expected)
    qkv, written = torch.empty_like(given.qkv), given.cache.clone()
    arguments = (written, given.rows, given.cos, given.sin, out)
    decode_attention(qkv, *arguments, workspace=workspace, tile=tile, pdl=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mul(given.qkv, 1.0, out=qkv)  # a kernel that the launch must wait for
        decode_attention(qkv, *arguments, workspace=workspace, tile=tile, pdl=True)
    qkv.fill_(torch.nan)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(written.nan_to_num(), cache.nan_to_num())


@pytest.mark.parametrize("per_head", [True, False])
def test_large_scores_do_not_overflow(per_head: bool) -> None:
    given = make(Heads(1, 1, 16, 16), torch.float32)
    given.qkv.mul_(300)
    check(given, replace(SPLIT, per_head=per_head))


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_reference_agrees_with_the_layer(qk_norm: QKNorm) -> None:
    length, hidden, window = 9, 24, 6
    attention = AttentionConfig(4, 2, 16, RopeConfig(1e4, 8), qk_norm=qk_norm, clip_qkv=0.9)
    config = ModelConfig("", "", 32, hidden, 8, attention, None, (LayerConfig(is_moe=False),), 1e-5, 64, False)
    layer = Attention(config, window, dtype=torch.float32, device=torch.device("cpu"))
    for parameter in layer.parameters():
        parameter.data.normal_()
    layer.qkv.pack(prepack=False)
    layer.out = torch.nn.Identity()
    rotary = Rotary(attention.rope, 64, dtype=torch.float32, device=torch.device("cpu"))
    x, cache = torch.randn(1, hidden), torch.randn(length, 2, 2, 16)
    last = torch.tensor([length - 1])
    group = DecodeGroup(slice(0, 1), slice(length - window, length), None)
    batch = ForwardBatch(last, last, last, {window: [group]})
    written, found = cache.clone(), torch.empty(1, 64)
    expected = layer(x, *rotary(last), written, batch)
    angles = torch.outer(torch.arange(64, dtype=torch.float32), inverse_frequencies(attention.rope)[0])
    one = torch.tensor([length], dtype=torch.int32)
    rows = DecodeRows(one, torch.tensor([0], dtype=torch.int32), torch.ones(1, dtype=torch.int32), 16)
    norm = None
    if qk_norm != "none":
        norm = QKNormWeights(layer.q_norm.weight, layer.k_norm.weight, 1e-5, full=qk_norm == "full")
    reference.decode_attention(
        layer.qkv(x), cache, rows, angles.cos(), angles.sin(), found, norm=norm, clip=0.9, window=window
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(cache, written)


def test_default_tiles_split_small_batches_only() -> None:
    assert default_tile(1, 32, 8, 128).splits > 1
    assert default_tile(128, 16, 16, 128).splits == 1
    assert default_tile(1, 16, 16, 128).per_head
    assert default_tile(1, 32, 8, 128, dtype=torch.float32).per_head
    assert not default_tile(1, 32, 8, 128).per_head


def test_the_default_tile_does() -> None:
    dtype = DTYPES[-1]
    given = make(Heads(2, 2, 16, 16), dtype, (33, 0, 100))
    expected, cache = poisoned(3, 32, dtype=dtype), given.cache.clone()
    reference.decode_attention(given.qkv, cache, given.rows, given.cos, given.sin, expected)
    shapes = workspace_shapes(3, 2, 16, default_tile(3, 2, 2, 16, dtype=dtype).splits)
    out, workspace = poisoned(3, 32, dtype=dtype), (poisoned(*shapes[0]), poisoned(*shapes[1]))
    decode_attention(given.qkv, given.cache, given.rows, given.cos, given.sin, out, workspace=workspace)
    assert_near(out, expected, dtype)


def test_splits_need_a_workspace() -> None:
    given = make(Heads(2, 2, 16, 16), torch.float32)
    out = poisoned(len(LENGTHS), 32)
    with pytest.raises(AssertionError, match="workspace"):
        decode_attention(given.qkv, given.cache, given.rows, given.cos, given.sin, out, tile=SPLIT)
