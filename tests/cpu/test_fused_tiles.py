"""Which way a step's experts go where nothing was measured."""

from __future__ import annotations

import pytest
import torch

from flexmoe.models.presets import PRESETS

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("preset", "most"), [("mixtral-8x7b", 2), ("qwen3-30b-a3b", 4), ("olmoe-1b-7b", 4), ("tinymistral-6x248m", 2)]
)
def test_pairs_read_alone_while_they_hardly_share_experts(preset: str, most: int) -> None:
    from flexmoe.kernels.triton.tiles import TileTable
    from flexmoe.models.fused_tiles import StepTiles

    tiles = StepTiles(TileTable(), PRESETS[preset].config, torch.bfloat16)
    assert [rows for rows in range(1, 65) if tiles.reads_alone(rows)] == list(range(1, most + 1))


def test_the_second_half_says_when_it_may_start() -> None:
    from flexmoe.kernels.triton.expert_down import DownGemvTile
    from flexmoe.kernels.triton.tiles import Measured, TileTable, expert_work
    from flexmoe.models.fused_tiles import StepTiles

    config = PRESETS["qwen3-30b-a3b"].config
    assert config.moe is not None
    work = expert_work("expert_down_gemv", torch.bfloat16, config.hidden_size, config.moe)
    for early in (False, True):
        table = TileTable([Measured(work, 1, DownGemvTile(early_ids=early), 1.0, 1.0)])
        first, second = StepTiles(table, config, torch.bfloat16).few_experts(1)
        assert first.late_trigger is second.early_ids is early


def test_long_contexts_are_split_more() -> None:
    from flexmoe.kernels.triton.tiles import TileTable
    from flexmoe.models.fused_tiles import StepTiles

    tiles = StepTiles(TileTable(), PRESETS["qwen3-30b-a3b"].config, torch.bfloat16)
    for rows in (1, 8, 128):
        assert tiles.attention(rows, long=True).splits > tiles.attention(rows, long=False).splits
