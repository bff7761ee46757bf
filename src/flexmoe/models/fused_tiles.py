"""Which tile each launch of a decode step takes, and which of two ways it goes.

Enters: a TileTable and a model's shapes. Leaves: for a number of rows what was measured, else what the operation, or a
rule of thumb, would choose. Each is looked up once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flexmoe.config.model import ModelConfig, MoEConfig
from flexmoe.kernels.triton import decode_attention, expert_down, expert_gate_up, norm_linear
from flexmoe.kernels.triton.route import RouteTile
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
GroupedTiles = tuple[expert_gate_up.GateUpTile | None, expert_down.DownTile | None]

_GEMV_ROWS = 4  # up to which each (token, expert) pair reads its expert alone: few of them share one
MOST_RANKED = 256  # that one launch can rank
_RANKED_LOGITS = 8192  # more of them take every expert's program longer than a second launch


class StepTiles:
    """Tiles by rows. dtype: of the model."""

    def __init__(self, table: TileTable, config: ModelConfig, dtype: torch.dtype) -> None:
        self._table, self._config, self._dtype = table, config, dtype
        self._found: dict[tuple[Work, int], Any] = {}

    def linear(self, rows: int, n: int, k: int, *, norm: bool) -> norm_linear.Tile:
        """Of a projection by a weight [n, k]."""
        found: norm_linear.Tile | None = self._find(linear_work(self._dtype, n, k, norm=norm), rows)
        return found or norm_linear.default_tile(rows, n, k, self._dtype)

    def attention(self, rows: int, *, long: bool) -> decode_attention.DecodeAttentionTile:
        """Of decode attention; long: over thousands of keys, not hundreds as in what was measured."""
        a, dtype = self._config.attention, self._dtype
        found: decode_attention.DecodeAttentionTile | None = self._find(attention_work(dtype, a), rows)
        tile = found or decode_attention.default_tile(rows, a.num_heads, a.num_kv_heads, a.head_dim, dtype=dtype)
        return decode_attention.for_long(tile) if long else tile

    def route(self, rows: int, dtype: torch.dtype) -> RouteTile | None:
        """Of the router, whose weight is of `dtype`; None: the operation's own."""
        found: RouteTile | None = self._find(route_work(dtype, self._config.hidden_size, self._moe), rows)
        return found

    def few_experts(self, rows: int) -> GemvTiles:
        """Of both halves of the experts, read for each row alone; they agree on when the second half starts."""
        hidden, moe, dtype = self._config.hidden_size, self._moe, self._dtype
        first = self._expert("expert_gate_up_gemv", rows) or expert_gate_up.default_gemv_tile(hidden, dtype)
        second = self._expert("expert_down_gemv", rows)
        second = second or expert_down.default_gemv_tile(moe.top_k, moe.expert_width, dtype)
        return first, replace(second, early_ids=second.early_ids and first.late_trigger)

    def many_experts(self, rows: int) -> GroupedTiles:
        """Of both halves of the experts, grouped; None: the operation's own."""
        return self._expert("expert_gate_up_grouped", rows), self._expert("expert_down_grouped", rows)

    def reads_alone(self, rows: int) -> bool:
        """Whether `few_experts` serve so many rows, not `many_experts`."""
        limit = self._table.limit(expert_work("expert_gemv", self._dtype, self._config.hidden_size, self._moe))
        return rows <= (_GEMV_ROWS if limit is None else limit)

    def groups_in_one(self, rows: int, slots: int) -> bool:
        """Whether one launch chooses experts and lists their rows; only where each expert has one slot."""
        experts = self._moe.num_experts
        if slots != experts or experts > MOST_RANKED:
            return False
        limit = self._table.limit(grouping_work(self._dtype, self._moe))
        return rows * experts <= _RANKED_LOGITS if limit is None else rows <= limit

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
