"""The table of measured tiles: which entry serves which rows, what files may hold, and who goes first."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmoe.config.model import MoEConfig
from flexmoe.kernels.triton import tiles
from flexmoe.kernels.triton.expert_gate_up import GateUpGemvTile, GateUpTile
from flexmoe.kernels.triton.norm_linear import DirectTile, DotTile, GemvTile
from flexmoe.kernels.triton.route import RouteTile
from flexmoe.kernels.triton.tiles import KINDS, Limit, Measured, TileTable, Work, expert_work, linear_work

BF16 = torch.bfloat16
QWEN = MoEConfig(num_experts=128, top_k=8, expert_width=768, renormalize=True)
QKV = linear_work(BF16, 5120, 2048, norm=True)
GROUPED = expert_work("expert_gate_up_grouped", BF16, 2048, QWEN)
ROUTE = Work.of("route", BF16, H=2048, E=128)


def measured(work: Work, rows: int, tile: Any) -> Measured:
    return Measured(work, rows, tile, 2.5, 3.0)


def test_the_nearest_rows_serve() -> None:
    one, two, eight = (RouteTile(1, block, 0, 4, 1) for block in (1, 2, 8))
    table = TileTable([measured(ROUTE, 1, one), measured(ROUTE, 2, two), measured(ROUTE, 8, eight)])
    assert [table.tile(ROUTE, rows) for rows in (1, 2, 3, 5, 8, 12, 15)] == [one, two, two, eight, eight, eight, eight]


def test_nothing_serves_from_afar_or_for_something_else() -> None:
    table = TileTable([measured(ROUTE, 8, RouteTile(1, 2, 0, 4, 1))])
    assert table.tile(ROUTE, 4) is None
    assert table.tile(ROUTE, 16) is None
    for other in (Work.of("route", BF16, H=2048, E=64), Work.of("route", torch.float16, H=2048, E=128), QKV):
        assert table.tile(other, 8) is None


def test_no_projection_crosses_into_another_block_of_rows() -> None:
    table = TileTable(
        [measured(QKV, 8, GemvTile()), measured(QKV, 32, DirectTile()), measured(QKV, 64, DotTile(block_t=64))]
    )
    assert table.tile(QKV, 7) == GemvTile()
    assert table.tile(QKV, 9) is None
    assert table.tile(QKV, 33) == table.tile(QKV, 64) == DotTile(block_t=64)
    assert table.tile(QKV, 65) is None


def test_grouped_experts_are_near_if_they_get_as_many_rows() -> None:
    """Among 128 experts one row and eight leave about one row to an expert; 512 leave 32."""
    table = TileTable([measured(GROUPED, 8, GateUpTile())])
    assert table.tile(GROUPED, 1) == table.tile(GROUPED, 16) == GateUpTile()
    assert table.tile(GROUPED, 512) is None
    assert TileTable([measured(GROUPED, 128, GateUpTile())]).tile(GROUPED, 256) is None  # 8 rows an expert, and 16


def test_measured_but_not_beaten_is_known() -> None:
    table = TileTable([measured(ROUTE, 4, RouteTile(1, 2, 0, 4, 1)), measured(ROUTE, 6, None)])
    assert table.tile(ROUTE, 6) is None
    assert table.tile(ROUTE, 4) is not None


def test_the_later_table_wins() -> None:
    first = TileTable([measured(ROUTE, 1, RouteTile(1, 1, 0, 4, 1))], [Limit(GROUPED, 4)])
    second = TileTable([measured(ROUTE, 1, RouteTile(1, 2, 0, 4, 1))], [Limit(GROUPED, 6)])
    both = first.with_(second)
    assert both.tile(ROUTE, 1) == RouteTile(1, 2, 0, 4, 1)
    assert both.limit(GROUPED) == 6
    assert first.limit(QKV) is None
    assert (len(first), len(both)) == (2, 2)


def table_of_all() -> TileTable:
    gemv = expert_work("expert_gate_up_gemv", BF16, 2048, QWEN)
    limit = Limit(expert_work("expert_gemv", BF16, 2048, QWEN), 5)
    entries = [
        measured(QKV, 1, DirectTile(fuse_norm=False)),
        measured(QKV, 8, None),
        measured(gemv, 1, GateUpGemvTile()),
    ]
    return TileTable(entries, [limit])


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    path, table = tmp_path / "tiles" / "a.json", table_of_all()
    tiles.write(path, table, "NVIDIA H200")
    again = tiles.read(path)
    assert sorted(map(str, again.measured())) == sorted(map(str, table.measured()))
    assert list(again.limits()) == list(table.limits())
    assert not tiles.read(tmp_path / "none.json").__len__()
    lines = path.read_text().splitlines()
    assert sum('"op"' in line for line in lines) == len(table), "one entry a line"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged and ignored"),
        ("[]", "is damaged and ignored"),
        ('{"version": 1, "tiles": []}', "is damaged and ignored"),
        ('{"version": 99, "tiles": [], "limits": []}', "is ignored: its version is 99"),
    ],
)
def test_a_file_of_no_use_is_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, said: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert len(tiles.read(path)) == 0
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert said in record.getMessage()


@pytest.mark.parametrize(
    "changes",
    [
        {"tile": {"warps_n": 1, "colour": 3}},
        {"tile": {"warps_n": "1"}},
        {"tile": {"fuse_norm": 1}},
        {"kind": "RouteTile"},
        {"op": "conv2d"},
        {"rows": 0},
        {"rows": True},
        {"shape": {"N": "x"}},
        {"shape": None},
    ],
)
def test_a_strange_entry_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    tiles.write(path, table_of_all(), "NVIDIA H200")
    content = json.loads(path.read_text())
    at = next(i for i, row in enumerate(content["tiles"]) if row.get("kind") == "DirectTile")
    content["tiles"][at] |= changes
    path.write_text(json.dumps(content))
    assert len(tiles.read(path)) == len(table_of_all()) - 1
    (record,) = caplog.records
    assert "1 entries are not understood and ignored" in record.getMessage()


def test_a_field_that_an_older_file_lacks_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    tiles.write(path, TileTable([measured(GROUPED, 8, GateUpTile(tail=32))]), "NVIDIA H200")
    assert tiles.read(path).tile(GROUPED, 8) == GateUpTile(tail=32)
    content = json.loads(path.read_text())
    del content["tiles"][0]["tile"]["tail"]
    path.write_text(json.dumps(content))
    assert tiles.read(path).tile(GROUPED, 8) == GateUpTile(tail=0)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4"),
        ("../..", "unknown"),
    ],
)
def test_names_of_files(name: str, stem: str) -> None:
    assert tiles.file_stem(name) == stem


def test_the_users_table_goes_before_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA X1")
    monkeypatch.setattr(tiles, "_SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(tiles.tiles_for(torch.device("cuda"))) == 0
    ours, theirs = RouteTile(1, 1, 0, 4, 1), RouteTile(1, 2, 0, 4, 1)
    entries = [measured(ROUTE, 1, ours), measured(ROUTE, 2, ours)]
    tiles.write(tiles.shipped_file("NVIDIA X1"), TileTable(entries), "NVIDIA X1")
    own = tiles.user_file("NVIDIA X1")
    assert own == tmp_path / "flexmoe" / "tiles" / "nvidia-x1.json"
    tiles.write(own, TileTable([measured(ROUTE, 1, theirs)]), "NVIDIA X1")
    table = tiles.tiles_for(torch.device("cuda"))
    assert (table.tile(ROUTE, 1), table.tile(ROUTE, 2)) == (theirs, ours)
    assert len(tiles.tiles_for(torch.device("cpu"))) == 0


def test_shipped_tables_are_understood(caplog: pytest.LogCaptureFixture) -> None:
    files = sorted(tiles._SHIPPED.glob("*.json"))
    assert files
    for file in files:
        tiles.read(file)
        assert file.stem == tiles.file_stem(json.loads(file.read_text())["gpu"])
    assert not caplog.records


def test_every_kind_is_a_tile() -> None:
    for kinds in KINDS.values():
        for kind in kinds:
            assert kind.__name__.endswith("Tile")
