"""The rooms without tensors, and the unit tests themselves, can be imported where torch is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

COLLECT = """
import sys, pytest
for name in ("torch", "triton", "transformers"):
    sys.modules[name] = None
sys.exit(pytest.main(["tests/unit", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""
IMPORT_ALL = """
import importlib, pkgutil, sys
for room in sys.argv[1:]:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        importlib.import_module(module.name)
print(*({"torch", "triton", "transformers"} & sys.modules.keys()))
"""


def run(program: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_unit_tests_are_collected_without_torch() -> None:
    run(COLLECT)


def test_the_rooms_without_tensors_import_no_torch_at_run_time() -> None:
    rooms = ("config", "scheduling", "planner", "models/families")
    here = ["flexmoe." + room.replace("/", ".") for room in rooms if (ROOT / "src/flexmoe" / room).exists()]
    assert run(IMPORT_ALL, *here) == ""
