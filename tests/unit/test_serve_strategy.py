"""FlexFlow's search keys in flexmoe.serve: searched, imported, exported, refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.errors import ConfigError
from flexmoe.models.presets import PRESETS
from flexmoe.serve.incremental import parse
from flexmoe.serve.settings import init, process
from flexmoe.serve.strategy import plan_in_force
from flexmoe.serve.translate import Limits, engine_options
from tests.unit.planning import machine

REQUIRED = {"num_gpus": 4, "memory_per_gpu": 80_000, "zero_copy_memory_per_node": 30_000}
OLMOE = PRESETS["olmoe-1b-7b"].config


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "settings", {})


@pytest.fixture
def machine_file(tmp_path: Path) -> str:
    path = tmp_path / "machine.json"
    machine().save(path)
    return str(path)


def chosen(**settings: Any) -> ParallelPlan:
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=256)
    return plan_in_force({**REQUIRED, **settings}, ParallelPlan(), OLMOE, limits, "bfloat16", cuda=True)


def test_nothing_is_searched_unasked() -> None:
    assert chosen() == ParallelPlan()
    assert chosen(search_budget=0) == ParallelPlan()


def test_a_budget_searches_over_num_gpus(machine_file: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = chosen(search_budget=-1, machine_model_file=machine_file)
    assert 1 <= found.num_ranks <= 4
    assert "the best of 30" in caplog.text
    chosen(search_budget=3, machine_model_file=machine_file)
    assert "the best of 3" in caplog.text


def test_only_data_parallel(machine_file: str) -> None:
    found = chosen(only_data_parallel=True, machine_model_file=machine_file)
    assert (found.data_parallel_size, found.tensor_parallel_size, found.pipeline_parallel_size) == (4, 1, 1)


def test_a_strategy_is_exported_and_imported(machine_file: str, tmp_path: Path) -> None:
    path = str(tmp_path / "strategy.json")
    found = chosen(search_budget=-1, machine_model_file=machine_file, export_strategy=path)
    assert ParallelPlan.read(path) == found
    assert chosen(import_strategy=path) == found


def test_memory_per_gpu_bounds_the_search(machine_file: str) -> None:
    with pytest.raises(ConfigError, match="no plan fits"):
        chosen(search_budget=-1, machine_model_file=machine_file, memory_per_gpu=2000)


def test_an_imported_strategy_reaches_the_engine(tmp_path: Path) -> None:
    """Its placement, too, which no degree can say."""
    plan = ParallelPlan(2, 2, placements={None: ExpertPlacement(64, (tuple(range(40)), tuple(range(24, 64))))})
    plan.write(tmp_path / "strategy.json")
    settings = {**REQUIRED, "import_strategy": str(tmp_path / "strategy.json")}
    options = engine_options(Limits(), OLMOE, settings, dtype="float16", cuda=False)
    assert options["plan"] == plan
    assert "tensor_parallel_size" not in options


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"search_budget": "many"}, "search_budget='many' is a str, not an int"),
        ({"search_budget": -2}, "search_budget=-2 is below -1"),
        ({"only_data_parallel": "yes"}, "only_data_parallel='yes' is neither True nor False"),
        ({"import_strategy": 3}, "import_strategy=3 is a int; give the name of a file"),
        ({"search_budget": 5, "import_strategy": "x.json"}, "so nothing is searched"),
        ({"search_budget": 5, "tensor_parallelism_degree": 2}, "tensor_parallelism_degree=2 is what a strategy says"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=said):
        init({**REQUIRED, **settings})


def test_files_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the plan none\.json cannot be read"):
        chosen(import_strategy="none.json")
    with pytest.raises(ConfigError, match="neither a file"):
        chosen(search_budget=1, machine_model_file="none.json")


def test_the_program_s_flags() -> None:
    config, _ = parse(
        ["--search-budget", "-1", "-only-data-parallel", "--machine-model-file", "m", "--search-alpha", "2"]
    )
    assert config == {
        "search_budget": -1, "only_data_parallel": True, "machine_model_file": "m", "search_alpha": "2",
    }  # fmt: skip
