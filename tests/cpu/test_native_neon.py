"""The C kernels for ARM's NEON, compiled across and run in an emulator, if there is one: near those of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flexmoe.kernels.cpu import levels, library
from tests.cpu.tiny_decoders import NEEDS_COMPILER

SOURCE = Path(__file__).with_name("native_step.c")
ACROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
(NEON,) = levels.of_machine("aarch64")


def outputs(compiler: str, level: levels.Level, target: Path, *emulator: str) -> np.ndarray:
    """The logits that the program prints, compiled like the kernels."""
    command = [flag for flag in levels.compile_command(compiler, level, SOURCE, target) if flag != "-shared"]
    library._run(*command, f"-I{library._FOLDER}", *(["-static"] if emulator else []))
    result = subprocess.run([*emulator, str(target)], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, "a row's bits depend on the rows beside it, or on threads"
    return np.array(result.stdout.split(), dtype=np.float64)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    compiler = library.find_compiler()
    assert compiler is not None
    return outputs(compiler, levels.PORTABLE, tmp_path_factory.mktemp("step") / "portable")


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    """Halves of the output are of bf16 models, whose keys may be rounded the other way."""
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    first = len(wanted) // 4  # of fp32
    assert np.abs(found[:first] - wanted[:first]).max() < 1e-4 * np.abs(wanted).max()


@NEEDS_COMPILER
@pytest.mark.parametrize("level", levels.available(), ids=lambda level: level.name)
def test_the_program_agrees_with_itself_at_each_level(
    level: levels.Level, portable: np.ndarray, tmp_path: Path
) -> None:
    compiler = library.find_compiler()
    assert compiler is not None
    near(outputs(compiler, level, tmp_path / "step"), portable)


@NEEDS_COMPILER
@pytest.mark.skipif(
    not (shutil.which(ACROSS) and shutil.which(EMULATOR)), reason=f"needs {ACROSS} and {EMULATOR}: packages of Debian"
)
def test_neon_under_an_emulator(portable: np.ndarray, tmp_path: Path) -> None:
    near(outputs(ACROSS, NEON, tmp_path / "step", EMULATOR), portable)
