"""The import contracts of pyproject.toml: complete, without exceptions, and broken by each kind of wrong import."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
LAYERS, TORCH_FREE = CONTRACTS

# The house in the order of its storeys, each file with one import that is allowed.
HOUSE = {
    "__init__": "import flexmoe.llm",
    "__main__": "import flexmoe.cli.main",
    "cli/main": "import flexmoe.server",
    "server/__init__": "import flexmoe.serve",
    "bench/__init__": "import flexmoe.serve",
    "serve": "import flexmoe.llm",
    "llm": "import flexmoe.engine",
    "engine/__init__": "import flexmoe.scheduling",
    "planner/__init__": "import flexmoe.scheduling",
    "scheduling/__init__": "import flexmoe.models.families",
    "models/__init__": "import flexmoe.moe",
    "models/families/__init__": "import flexmoe.config",
    "moe/__init__": "import flexmoe.layers",
    "layers/__init__": "import flexmoe.kernels\nimport torch",
    "kernels/__init__": "import flexmoe.config",
    "parallel/__init__": "import flexmoe.config",
    "config/__init__": "import flexmoe.errors",
    "errors": "import difflib",
}
TYPE_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flexmoe.engine import Engine"


def lint(folder: Path, changes: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Build the house in `folder`, with `changes` added to its files, and check this repository's contracts on it."""
    for name, source in {**HOUSE, **(changes or {})}.items():
        path = folder / "flexmoe" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("__init__.py").touch()
        path.write_text(f"{HOUSE.get(name, '')}\n{source}\n")
    command = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(sys.argv[1], no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", command, str(ROOT / "pyproject.toml")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_allowed_house_passes(tmp_path: Path) -> None:
    result = lint(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("config/plan", "import flexmoe.engine", "flexmoe.config is not allowed to import flexmoe.engine"),
        ("moe/block", "def f():\n    import flexmoe.models", "flexmoe.moe is not allowed to import flexmoe.models"),
        ("layers/norm", TYPE_ONLY, "flexmoe.layers is not allowed to import flexmoe.engine"),
        ("kernels/a", "import flexmoe.parallel", "flexmoe.kernels is not allowed to import flexmoe.parallel"),
        ("engine/a", "import flexmoe.planner", "flexmoe.engine is not allowed to import flexmoe.planner"),
        ("bench/a", "import flexmoe.server", "flexmoe.bench is not allowed to import flexmoe.server"),
        ("config/face", "from flexmoe import LLM", "flexmoe.config is not allowed to import flexmoe.llm"),
        ("utils", "", "- flexmoe.utils"),
        ("config/dtype", "import torch.nn", "flexmoe.config is not allowed to import torch"),
        ("errors", "def f():\n    import transformers", "flexmoe.errors is not allowed to import transformers"),
    ],
)
def test_a_wrong_import_breaks_a_contract(tmp_path: Path, name: str, source: str, said: str) -> None:
    result = lint(tmp_path, {name: source})
    assert result.returncode == 1, result.stdout + result.stderr
    assert said in result.stdout


def test_the_contracts_have_no_exceptions() -> None:
    for contract in CONTRACTS:
        assert not {key for key in contract if "ignore" in key or "allow" in key}
    assert LAYERS["exhaustive"] is True


def test_every_room_without_tensors_is_under_contract() -> None:
    rooms = ("config", "scheduling", "planner", "models/families")
    here = {"flexmoe." + room.replace("/", ".") for room in rooms if (ROOT / "src/flexmoe" / room).exists()}
    missing = sorted(here - set(TORCH_FREE["source_modules"]))
    assert not missing, f"add {missing} to the source_modules of the contract torch-free in pyproject.toml"
