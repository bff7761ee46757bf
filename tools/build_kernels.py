"""Hatch's hook for wheels: the C kernels, compiled for every instruction set of this kind of machine.

Enters: a wheel that is being built. Leaves: one library a level inside it and a tag that names the platform; without a
C compiler, the pure wheel, whose kernels are compiled at the first start or left to torch. An editable install stays
pure, too: its sources change.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("src/flexmoe/kernels/cpu")
INSIDE = "flexmoe/kernels/cpu/built"  # as kernels/cpu/library.py looks for it
COMPILERS = ("cc", "gcc", "clang")


class KernelsHook(BuildHookInterface[Any]):
    """Compiles on Linux only: elsewhere a wheel for all is more use than one for a machine that nobody tests."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries to the wheel, and its tag."""
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
        if version == "editable" or not platform.startswith("linux"):
            return
        if compiler is None:
            self.app.display_warning("no C compiler (cc, gcc or clang): the wheel comes without its C kernels")
            return
        self._own = tempfile.TemporaryDirectory()
        for built in compile_levels(compiler, Path(self.root) / KERNELS, Path(self._own.name)):
            build_data["force_include"][str(built)] = f"{INSIDE}/{built.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what is in the wheel by now."""
        if hasattr(self, "_own"):
            self._own.cleanup()


def compile_levels(compiler: str, kernels: Path, folder: Path) -> list[Path]:
    """LEVEL.so for each level of this machine. Raises CalledProcessError where the compiler fails."""
    levels = load_levels(kernels / "levels.py")
    made = []
    for level in levels.of_machine():
        target = folder / f"{level.name}.so"
        subprocess.run(levels.compile_command(compiler, level, kernels / "decode.c", target), check=True)
        made.append(target)
    return made


def load_levels(file: Path) -> ModuleType:
    """The module levels.py by its path: the package cannot be imported where it is built, without torch."""
    spec = importlib.util.spec_from_file_location("flexmoe_levels", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
