"""Which tile each launch of a decode step takes, and which of two ways it goes.

Enters: a TileTable and a model's shapes. Leaves: for a number of rows what was measured, else what the operation, or a
rule of thumb, would choose. Each is looked up once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig, MoEConfig
from flexmoe.kernels.hopper.products import ExpertProducts, Shape
from flexmoe.kernels.triton import decode_attention, expert_down, expert_gate_up, norm_linear
from flexmoe.kernels.triton.route import RouteTile
from flexmoe.kernels.triton.route import default_tile as default_route
from flexmoe.kernels.triton.tiles import (
    TileTable,
    Work,
    attention_work,
    expert_work,
    grouping_work,
    linear_work,
    route_work,
)

GemvTiles = tuple[expert_gate_up.GateUpGemvTile, expert_down.DownGemvTile]
GroupedTiles = tuple[expert_gate_up.GateUpTile, expert_down.DownTile]

# Each (token, expert) pair reads its expert alone for so few rows, and while pairs hardly share experts: measured on an
# H200, 1.2 pairs an expert cost nothing (Mixtral and OLMoE at 90% and 77% of the floor), 1.5 a tenth of the step.
_GEMV_ROWS, _PAIRS_AN_EXPERT = 4, 1.25
MOST_RANKED = 256  # that one launch can rank
# Rows of an expert on average: from which on the kernels for Hopper are faster; and those that just fill a wide tile of
# theirs (192 rows) or a square one (288), since some experts have more. All measured on an H200.
_PRODUCTS_ROWS, _FILL_WIDE, _FILL_SQUARE = 64, range(156, 180), range(180, 268)
# From which on wide tiles are faster in any case, of narrow experts and of wide ones.
_WIDE_ROWS, _WIDE_ROWS_OF_WIDE = 384, 300
# Of an expert's width, from which on it pays to copy rows to their experts, for wide tiles of gate and up: on an H200
# 1.5% of that product for 14,336, and the tiles gain 4 to 5%; for 1,024 the copy alone is 10%.
_COPIED_WIDTH = 6144


class StepTiles:
    """Tiles by rows. dtype: of the model."""

    def __init__(
        self, table: TileTable, config: ModelConfig, dtype: torch.dtype, products: ExpertProducts | None = None
    ) -> None:
        """products: the kernels for Hopper, where they serve this model's experts."""
        self._table, self._config, self._dtype, self._products = table, config, dtype, products
        self._found: dict[tuple[Work, int], Any] = {}
        self._grouped: dict[int, GroupedTiles] = {}

    def linear(self, rows: int, n: int, k: int, *, norm: bool) -> norm_linear.Tile:
        """Of a projection by a weight [n, k]."""
        found: norm_linear.Tile | None = self._find(linear_work(self._dtype, n, k, norm=norm), rows)
        return found or norm_linear.default_tile(rows, n, k, self._dtype)

    def attention(self, rows: int, *, long: bool) -> decode_attention.DecodeAttentionTile:
        """Of decode attention; long: over thousands of keys, not hundreds."""
        a, dtype = self._config.attention, self._dtype
        found: decode_attention.DecodeAttentionTile | None = self._find(attention_work(dtype, a, long=long), rows)
        if found is not None:
            return found
        if long:
            return decode_attention.for_long(self.attention(rows, long=False))
        return decode_attention.default_tile(rows, a.num_heads, a.num_kv_heads, a.head_dim, dtype=dtype)

    def route(self, rows: int, weight: Tensor) -> RouteTile:
        """Of the router with that weight [E, H]."""
        experts, hidden = weight.shape
        found: RouteTile | None = self._find(route_work(weight.dtype, hidden, self._moe), rows)
        return found or default_route(rows, hidden, experts, weight.itemsize)

    def few_experts(self, rows: int, *, in_order: bool = True) -> GemvTiles:
        """Of both halves of the experts, read for each row alone; the second one says when it may start.

        in_order: a slot is an expert, so that logits tell which weights to ask for early.
        """
        hidden, moe, dtype = self._config.hidden_size, self._moe, self._dtype
        first = self._expert("expert_gate_up_gemv", rows) or expert_gate_up.default_gemv_tile(hidden, dtype)
        second = self._expert("expert_down_gemv", rows)
        second = second or expert_down.default_gemv_tile(moe.top_k, moe.expert_width, dtype)
        second = second if in_order else replace(second, early_ids=False)
        return replace(first, late_trigger=second.early_ids), second

    def many_experts(self, rows: int) -> GroupedTiles:
        """Of both halves of the experts, grouped. A rank that holds a part of them gets a part of the choices, too."""
        if rows not in self._grouped:
            moe = self._moe
            shape = rows, moe.top_k, moe.num_experts, self._config.hidden_size, moe.expert_width, self._dtype
            first = self._expert("expert_gate_up_grouped", rows) or expert_gate_up.default_tile(*shape)
            second = self._expert("expert_down_grouped", rows) or expert_down.default_tile(*shape)
            self._grouped[rows] = first, second
        return self._grouped[rows]

    def products(self, rows: int) -> ExpertProducts | None:
        """The kernels for Hopper if they serve experts with so many rows in a step, not `many_experts`."""
        enough = rows * self._moe.top_k >= _PRODUCTS_ROWS * self._moe.num_experts
        return self._products if enough else None

    def gate_up_shape(self, rows: int) -> Shape:
        """Of the tiles that `products` take for so many rows in a step; for wide ones rows are copied to experts."""
        return "wide" if self._copies and self.down_shape(rows) == "wide" else "narrow"

    def down_shape(self, rows: int) -> Shape:
        """As for gate and up, of the second half."""
        each = rows * self._moe.top_k // self._moe.num_experts
        if each in _FILL_SQUARE:
            return "square"
        many = each >= (_WIDE_ROWS_OF_WIDE if self._copies else _WIDE_ROWS)
        return "wide" if many or each in _FILL_WIDE else "narrow"

    @property
    def _copies(self) -> bool:
        return self._moe.expert_width >= _COPIED_WIDTH

    def reads_alone(self, rows: int) -> bool:
        """Whether `few_experts` serve so many rows, not `many_experts`."""
        limit = self._table.limit(expert_work("expert_gemv", self._dtype, self._config.hidden_size, self._moe))
        if limit is not None:
            return rows <= limit
        return rows <= _GEMV_ROWS and rows * self._moe.top_k <= _PAIRS_AN_EXPERT * self._moe.expected_experts(rows)

    def groups_in_one(self, rows: int, slots: int) -> bool:
        """Whether one launch chooses experts and lists their rows; only where each expert has one slot.

        And only where that was measured to be faster: on an H200 steps of 8 rows seem to lose 5 us a layer by it.
        """
        experts = self._moe.num_experts
        if slots != experts or experts > MOST_RANKED:
            return False
        limit = self._table.limit(grouping_work(self._dtype, self._moe))
        return limit is not None and rows <= limit

    @property
    def _moe(self) -> MoEConfig:
        assert self._config.moe is not None
        return self._config.moe

    def _expert(self, op: str, rows: int) -> Any:
        return self._find(expert_work(op, self._dtype, self._config.hidden_size, self._moe), rows)

    def _find(self, work: Work, rows: int) -> Any:
        if (work, rows) not in self._found:
            self._found[work, rows] = self._table.tile(work, rows)
        return self._found[work, rows]
