"""Tiles for Triton's interpreter, where what a kernel computes is beside the point: few programs, and large ones."""

from __future__ import annotations

from typing import Any, ClassVar

from flexmoe.kernels.triton.decode_attention import DecodeAttentionTile
from flexmoe.kernels.triton.expert_down import DownGemvTile, DownTile
from flexmoe.kernels.triton.expert_gate_up import GateUpGemvTile, GateUpTile
from flexmoe.kernels.triton.norm_linear import DotTile
from flexmoe.kernels.triton.route import RouteTile
from flexmoe.kernels.triton.tiles import TileTable, Work


class Coarse(TileTable):
    """Few, large programs: the interpreter takes them one after the other. grouped: rows of one expert together."""

    TILES: ClassVar[dict[str, Any]] = {
        "norm_linear": DotTile(16, 128, 64, num_stages=1),
        "decode_attention": DecodeAttentionTile(16),
        "route": RouteTile(16, 16, 64, 4, 1),
        "expert_gate_up_gemv": GateUpGemvTile(pairs=4, columns=128, num_warps=8),
        "expert_down_gemv": DownGemvTile(64, 128, 2),
        "expert_gate_up_grouped": GateUpTile(16, 32, 64, num_stages=1, swap=False),
        "expert_down_grouped": DownTile(16, 64, 32, num_stages=1, swap=False),
    }

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self._alone = 0 if grouped else 8

    def tile(self, work: Work, rows: int) -> Any:
        return self.TILES[work.op]

    def limit(self, work: Work) -> int:
        return self._alone if work.op == "expert_gemv" else 0
