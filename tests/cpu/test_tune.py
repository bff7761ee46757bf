"""`flexmoe tune` without a GPU: who wins a contest, what time leaves out, what is written, what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from flexmoe.bench import tune
from flexmoe.bench.kernel_timer import Timing
from flexmoe.bench.tune_candidates import nearest_first
from flexmoe.bench.tune_jobs import JOBS, Setting, jobs
from flexmoe.cli import tune as cli
from flexmoe.cli.main import main
from flexmoe.kernels.triton import tiles
from flexmoe.kernels.triton.norm_linear import DirectTile, DotTile
from flexmoe.kernels.triton.tiles import TileTable, expert_work, grouping_work, route_work
from flexmoe.models.presets import PRESETS

BF16, CPU = torch.bfloat16, torch.device("cpu")
CONFIG = PRESETS["olmoe-1b-7b"].config
SETTING = Setting(CONFIG, BF16)
assert CONFIG.moe is not None
ROUTE = route_work(BF16, CONFIG.hidden_size, CONFIG.moe)
ALONE = expert_work("expert_gemv", BF16, CONFIG.hidden_size, CONFIG.moe)
IN_ONE = grouping_work(BF16, CONFIG.moe)


class Decoder:
    """Knows its table; a step fails with tiles of eight warps."""

    def __init__(self, table: TileTable, rows: int) -> None:
        self.table, self.rows = table, rows
        self.tile = table.tile(ROUTE, rows)

    def step(self, *_: Any) -> None:
        if self.tile is not None and self.tile.num_warps == 8:
            raise RuntimeError("out of resource: shared memory\nRequired ...")


class MiniModel:
    """A step takes 10 us; a router's tile is the faster the more experts it takes at once, and wrong with 16 warps.

    Up to 3 rows experts alone are quicker, up to 16 rows one launch for choosing and listing.
    """

    timed = 0

    def __init__(self, *_: Any, head: bool, timer: Any) -> None:
        self.head = head

    def run(self, decoder: Decoder, _: Any) -> None:
        decoder.step()

    def inputs(self, rows: int, *, long: bool = False) -> Any:
        return type("Inputs", (), {"rows": type("Rows", (), {"lengths": torch.ones(rows)}), "cache": None})

    def decoder(self, table: TileTable, rows: int) -> Decoder:
        return Decoder(table, rows)

    def output(self, decoder: Decoder, _: Any, stage: str) -> torch.Tensor:
        wrong = decoder.tile is not None and decoder.tile.num_warps == 16
        return torch.full((4,), torch.nan if wrong else 1.0)

    def microseconds(self, decoder: Decoder, _: Any) -> float:
        type(self).timed += 1
        us = 10.0 if decoder.tile is None else 9.9 - decoder.tile.block_e
        alone, in_one = decoder.table.limit(ALONE), decoder.table.limit(IN_ONE)
        us += 0.5 * (alone is not None and (decoder.rows <= alone) != (decoder.rows <= 3))
        return us + 0.5 * (in_one is not None and (decoder.rows <= in_one) != (decoder.rows <= 16))

    def moved(self, _: int) -> float:
        return 1e6


@pytest.fixture(autouse=True)
def _fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "MiniModel", MiniModel)


def tuner(**options: Any) -> tune.Tuner:
    return tune.Tuner(SETTING, CPU, TileTable(), timer=lambda *_: Timing(1.0, 1.0, 1.0), **options)


def test_the_best_that_is_right_wins() -> None:
    tuned = tuner().run([1, 2], ["route"], 60)
    first, second = tuned.contests
    assert (first.job.rows, second.job.rows) == (1, 2)
    best = max((t for t in first.job.candidates if t.num_warps < 8), key=lambda tile: tile.block_e)
    assert first.tile.block_e == best.block_e
    assert first.tile.num_warps < 8
    assert (first.default_us, first.us) == (10.0, pytest.approx(9.9 - best.block_e))
    assert any("out of resource: shared memory" in failure for failure in first.failures)
    assert any("its result is off by nan" in failure for failure in first.failures)
    assert tuned.table.tile(ROUTE, 1) == first.tile
    assert not tuned.unfinished()
    assert [(effect.rows, effect.before, effect.after) for effect in tuned.effects] == [
        (1, 10.0, pytest.approx(first.us)), (2, 10.0, pytest.approx(second.us))
    ]  # fmt: skip


def test_what_is_hardly_better_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MiniModel, "microseconds", lambda _, decoder, __: 10.0 - 0.01 * (decoder.tile is not None))
    (contest,) = tuner().run([1], ["route"], 60).contests
    assert contest.tile is None
    assert contest.us == contest.default_us == 10.0


def test_who_wins_by_chance_loses_the_duel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is quick when it is first timed only."""
    seen: set[Any] = set()

    def microseconds(_: Any, decoder: Decoder, __: Any) -> float:
        lucky = decoder.tile is not None and decoder.tile not in seen
        seen.add(decoder.tile)
        return 5.0 if lucky else 10.0

    monkeypatch.setattr(MiniModel, "microseconds", microseconds)
    (contest,) = tuner().run([1], ["route"], 60).contests
    assert contest.tile is None


def test_limits_are_the_last_rows_that_gain() -> None:
    tuned = tuner().run([1], [tune.LIMITS], 60)
    assert {limit.work: limit.rows for limit in tuned.limits} == {ALONE: 3, IN_ONE: 16}
    assert tuned.table.limit(ALONE) == 3


def test_time_is_kept_and_what_it_leaves_out_is_told() -> None:
    clock = itertools.count()
    tuned = tuner(clock=lambda: float(next(clock))).run([1, 2, 4], ["route", "limits"], 1.5)
    assert [bool(contest.us) for contest in tuned.contests] == [True, False, False]
    assert [contest.job.rows for contest in tuned.unfinished()][-2:] == [2, 4]
    assert not tuned.limits
    assert len(tuned.table) == 1


def test_what_is_like_the_best_comes_first() -> None:
    best = DirectTile()
    two, one, other = DirectTile(warps_n=2, warps_k=4), DirectTile(warps_n=2), DotTile()
    assert nearest_first([other, two, one], best) == [one, two, other]


def test_jobs_of_all_presets_have_candidates() -> None:
    for preset, rows in itertools.product(PRESETS.values(), (1, 3, 8, 32, 128, 256)):
        made = list(jobs(Setting(preset.config, BF16), rows, tuple(JOBS)))
        experts = "expert_down_gemv" if rows < 4 else "expert_down_grouped"
        assert {job.work.op for job in made} >= {"norm_linear", "decode_attention", "route", experts}
        for job in made:
            assert len(set(job.candidates) - {job.default}) > 1, (preset.name, job.name, rows)
            assert all(type(tile) in tiles.KINDS[job.work.op] for tile in job.candidates)


# ------------------------------------------------------------------------------------------------------- command line


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["tune", "mixtral-8x7b"])
    assert result.exit_code == 1
    assert result.output == "Error: flexmoe tune times kernels on a CUDA GPU, and there is none here.\n"


def test_operations_are_named_alike() -> None:
    assert cli.OPS == tune.OPS
    result = CliRunner().invoke(main, ["tune", "--ops", "norm_linear,conv"])
    assert result.exit_code == 2
    assert "'conv' is not one of norm_linear, " in result.output


def test_results_are_printed_and_added_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexmoe.bench import bandwidth

    monkeypatch.setattr(cli, "_gpu", lambda _: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X1")
    monkeypatch.setattr(bandwidth, "read_bandwidth", lambda _: 1e12)
    monkeypatch.setattr(tune, "tune_model", lambda *_, **__: tuner().run([1], ["route", "limits"], 60))
    out = tmp_path / "x.json"
    for _ in range(2):
        result = CliRunner().invoke(main, ["tune", "olmoe-1b-7b", "--batch", "1", "--out", str(out)])
        assert result.exit_code == 0, result.output
    assert "expert_gemv: up to 3 rows" in result.output
    assert "1 rows: 10.00 us a layer before, " in result.output
    table = tiles.read(out)
    assert len(table) == 3
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["tune", "olmoe-1b-7b", "--out", str(tmp_path / "file" / "x.json")])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert table.tile(ROUTE, 1) is not None
