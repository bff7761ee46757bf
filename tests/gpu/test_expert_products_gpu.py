"""The kernels for Hopper's tensor cores, of both halves of experts: against plain torch, in graphs, again and again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flexmoe.kernels.hopper.products import ExpertProducts, Shape
from flexmoe.kernels.triton.copy_by_expert import copy_by_expert
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from tests.gpu.hopper import NEEDS_HOPPER, off

DEVICE = torch.device("cuda")
pytestmark = NEEDS_HOPPER
# tokens, top_k, experts, hidden, width: one row; columns and depths that tiles do not divide; blocks that are full, and
# one row more; many experts of few rows, few of many
SHAPES = [
    (1, 2, 8, 64, 64), (40, 2, 4, 256, 256), (300, 2, 5, 200, 72), (513, 4, 16, 512, 384), (160, 1, 1, 128, 128),
    (161, 1, 1, 128, 128), (320, 2, 2, 64, 520), (257, 3, 33, 128, 136), (2000, 2, 3, 264, 520), (96, 8, 512, 64, 64),
    (176, 1, 1, 128, 128), (193, 1, 1, 128, 328), (350, 1, 1, 64, 64), (600, 2, 257, 64, 128),
    (208, 1, 1, 64, 128), (288, 1, 1, 128, 192), (289, 1, 1, 128, 192), (1040, 1, 4, 128, 200), (600, 2, 5, 192, 136),
]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Experts, tokens, and who chose whom."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    ids: Tensor
    weights: Tensor

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Layer:
        tokens, top_k, experts, hidden, width = shape
        torch.manual_seed(seed)
        ids = torch.rand(tokens, experts, device=DEVICE).argsort(-1)[:, :top_k].int().contiguous()
        return Layer(
            torch.randn(tokens, hidden, device=DEVICE).to(dtype),
            (torch.randn(experts, 2 * width, hidden, device=DEVICE) * hidden**-0.5).to(dtype),
            (torch.randn(experts, hidden, width, device=DEVICE) * width**-0.5).to(dtype),
            ids, torch.rand(tokens, top_k, device=DEVICE),
        )  # fmt: skip

    def grouped(self) -> tuple[Tensor, Tensor]:
        rows = torch.full((len(self.down), len(self.x)), -1, dtype=torch.int32, device=DEVICE)
        counts = torch.empty(len(self.down), dtype=torch.int32, device=DEVICE)
        group_by_expert(self.ids, len(self.down), rows, counts)
        return rows, counts

    def hidden(self, rows: Tensor, counts: Tensor) -> Tensor:
        """In fp32, in the order of slots."""
        found, top_k = [], self.ids.shape[1]
        for slot, count in enumerate(counts.tolist()):
            both = self.x[rows[slot, :count].long() // top_k].float() @ self.gate_up[slot].float().T
            gate, up = both.chunk(2, -1)
            found.append(torch.nn.functional.silu(gate) * up)
        return torch.cat(found)

    def y(self, hidden: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        """In fp32, from hidden rows in the order of slots; NaN where no slot is chosen."""
        y = torch.full((self.ids.numel(), self.x.shape[1]), torch.nan, device=DEVICE)
        for slot, part in enumerate(hidden.float().split(counts.tolist())):
            a = rows[slot, : len(part)].long()
            y[a] = part @ self.down[slot].float().T * self.weights.flatten()[a][:, None]
        return y


def computed(layer: Layer, products: ExpertProducts, *, tiles: Shape = "narrow") -> tuple[Tensor, Tensor]:
    """hidden and y, where what is not written stays NaN."""
    (rows, counts), choices = layer.grouped(), layer.ids.numel()
    hidden = layer.x.new_full((choices, layer.down.shape[2]), torch.nan)
    y = layer.x.new_full((choices, layer.x.shape[1]), torch.nan)
    x, top_k = layer.x, layer.ids.shape[1]
    first: Shape = "narrow" if tiles == "square" else tiles
    if first == "wide":
        x = layer.x.new_full((choices, layer.x.shape[1]), torch.nan)
        copy_by_expert(layer.x, rows, counts, x, top_k=top_k)
    products.gate_up(x, rows, counts, layer.gate_up, hidden, top_k=top_k, shape=first)
    products.down(hidden, rows, counts, layer.weights, layer.down, y, shape=tiles)
    return hidden, y


def check(layer: Layer, products: ExpertProducts, *, tiles: Shape = "narrow") -> None:
    hidden, y = computed(layer, products, tiles=tiles)
    rows, counts = layer.grouped()
    here = int(counts.sum())
    assert hidden[here:].isnan().all()
    assert off(hidden[:here], layer.hidden(rows, counts)) < 4e-3
    expected = layer.y(hidden[:here], rows, counts)
    chosen = ~expected[:, 0].isnan()
    assert y[~chosen].isnan().all()
    assert off(y[chosen], expected[chosen]) < 4e-3
    assert not products._progress.any()  # ready for the next launch


@pytest.fixture(scope="module")
def products() -> ExpertProducts:
    return ExpertProducts(DEVICE, torch.bfloat16)


TILES = pytest.mark.parametrize("tiles", ["narrow", "square", "wide"])


@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_halves_are_what_torch_computes(products: ExpertProducts, shape: tuple[int, ...], tiles: Shape) -> None:
    check(Layer.of(shape), products, tiles=tiles)


@TILES
def test_in_fp16(tiles: Shape) -> None:
    check(Layer.of((300, 2, 5, 200, 72), torch.float16), ExpertProducts(DEVICE, torch.float16), tiles=tiles)


@TILES
def test_all_tokens_on_one_expert_and_none_on_others(products: ExpertProducts, tiles: Shape) -> None:
    layer = Layer.of((700, 2, 6, 128, 128))
    layer.ids[:, 0], layer.ids[:, 1] = 4, 2
    check(layer, products, tiles=tiles)


@TILES
def test_choices_without_a_slot_here(products: ExpertProducts, tiles: Shape) -> None:
    layer = Layer.of((400, 3, 9, 128, 192))
    layer.ids[torch.rand(layer.ids.shape, device=DEVICE) < 0.4] = -1
    check(layer, products, tiles=tiles)
    layer.ids.fill_(-1)
    hidden, y = computed(layer, products, tiles=tiles)
    assert hidden.isnan().all()
    assert y.isnan().all()


def test_the_same_bits_time_after_time_in_all_tiles(products: ExpertProducts) -> None:
    layer = Layer.of((1500, 4, 12, 512, 256))
    first = computed(layer, products)
    turns: tuple[Shape, ...] = "square", "wide", "narrow"
    for turn in range(6):
        for again, before in zip(computed(layer, products, tiles=turns[turn % 3]), first, strict=True):
            assert torch.equal(again, before)


def test_a_row_has_the_same_bits_in_whatever_company(products: ExpertProducts) -> None:
    """Sums go along a row's own columns, so neither tiles nor other rows change them."""
    layer = Layer.of((900, 2, 4, 256, 128))
    _, y = computed(layer, products)
    for count in (1, 33, 450):
        fewer = Layer(layer.x[:count], layer.gate_up, layer.down, layer.ids[:count], layer.weights[:count])
        _, alone = computed(fewer, products)
        assert torch.equal(alone, y[: count * 2])


@TILES
def test_halves_of_the_last_tiles_have_the_bits_of_whole_ones(products: ExpertProducts, tiles: Shape) -> None:
    """One tile more than processors: the last columns are in two halves, and whole where they come first."""
    columns = torch.cuda.get_device_properties(DEVICE).multi_processor_count + 1
    layer = Layer.of((150, 1, 1, 256 * columns, 64))
    last_first = Layer(layer.x, layer.gate_up, layer.down.roll(256, 1), layer.ids, layer.weights)
    (_, y), (_, rolled) = (computed(each, products, tiles=tiles) for each in (layer, last_first))
    assert torch.equal(y.roll(256, 1), rolled)
    width = 128 * columns
    layer = Layer.of((150, 1, 1, 64, width))
    last_first = Layer(
        layer.x, layer.gate_up.view(1, 2, width, 64).roll(128, 2).view_as(layer.gate_up), layer.down, layer.ids,
        layer.weights,
    )  # fmt: skip
    (hidden, _), (rolled, _) = (computed(each, products, tiles=tiles) for each in (layer, last_first))
    assert torch.equal(hidden.roll(128, 1), rolled)


def test_in_a_graph_that_is_replayed_with_other_choices(products: ExpertProducts) -> None:
    shape = (256, 2, 8, 128, 128)
    layer, other = Layer.of(shape), Layer.of(shape, seed=1)
    rows, counts = layer.grouped()
    hidden, y = torch.empty(512, 128, device=DEVICE, dtype=torch.bfloat16), layer.x.new_empty(512, 128)

    def step() -> None:
        group_by_expert(layer.ids, 8, rows, counts, pdl=True)
        products.gate_up(layer.x, rows, counts, layer.gate_up, hidden, top_k=2, pdl=True)
        products.down(hidden, rows, counts, layer.weights, layer.down, y, pdl=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for ids in (other.ids, layer.ids.clone()):
        layer.ids.copy_(ids)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        _, expected = computed(layer, products)
        assert torch.equal(y, expected)


def test_more_experts_than_it_takes_are_refused(products: ExpertProducts) -> None:
    gate_up = torch.empty(513, 16, 8, device=DEVICE, dtype=torch.bfloat16)
    rows, counts = (
        torch.zeros(513, 1, dtype=torch.int32, device=DEVICE),
        torch.zeros(513, dtype=torch.int32, device=DEVICE),
    )
    with pytest.raises(ValueError, match="513 experts, of which 512"):
        products.gate_up(gate_up[0, :1], rows, counts, gate_up, gate_up[0], top_k=1)
