"""The compiled C kernels. Enters: an instruction set. Leaves: the library made for it, or why there is none.

A wheel brings a library for each level of levels.py. From a source checkout the one that is asked for is compiled once
into the user's cache folder, and never at import: the engine asks when it starts.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flexmoe.errors import ConfigError
from flexmoe.kernels.cpu import levels
from flexmoe.kernels.cpu.levels import Level
from flexmoe.kernels.kept import cache_folder, digest, find, keep

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
BUILT = "built"  # where a wheel has its libraries, beside this file
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 120.0  # seconds for the compiler; it takes 2 to 5


@dataclass(frozen=True, slots=True)
class Native:
    """The library, or None and why."""

    library: ctypes.CDLL | None
    reason: str = ""


def choose(isa: str = "auto") -> Level:
    """The level of this name; "auto" is the best that this processor has. Raises ConfigError for one it has not."""
    usable = levels.available()
    found = usable[:1] if isa == "auto" else tuple(level for level in usable if level.name == isa)
    if not found:
        names = ", ".join(["auto", *(level.name for level in usable)])
        raise ConfigError(f"isa={isa!r} is not what this processor can run; use one of {names}.")
    return found[0]


@functools.cache
def load(isa: str = "auto") -> Native:
    """Load the kernels for a level, compiling them first if they are not there yet; asked once a process."""
    level = choose(isa)
    packaged = _packaged(level)
    if packaged is not None:
        return Native(packaged)
    compiler = find_compiler()
    if compiler is None:
        return Native(None, "no C compiler found (cc, gcc or clang); with one, decoding is about twice as fast")
    try:
        return Native(_open(compiler, level))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        reason = f"the C kernels could not be built with {compiler}: {output or error}"
        _log.warning("%s", reason)
        return Native(None, reason.splitlines()[0])


def _packaged(level: Level) -> ctypes.CDLL | None:
    """The library that came with the package. None: a source checkout, or a wheel made for another kind of system."""
    file = _FOLDER / BUILT / f"{level.name}.so"
    try:
        return ctypes.CDLL(str(file)) if file.is_file() else None
    except OSError as error:
        _log.warning("the C kernels of the package cannot be loaded and are compiled anew: %s", error)
        return None


def find_compiler() -> str | None:
    """The path of the C compiler to use."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def _open(compiler: str, level: Level) -> ctypes.CDLL:
    """The library from the cache; where there can be none, one compiled for this process alone."""
    name = f"{level.name}-{_fingerprint(compiler, level)}"
    folder = cache_folder()
    if folder is not None:
        try:
            return ctypes.CDLL(str(find(folder, name, "so") or _compile(compiler, level, folder, name)))
        except OSError as error:
            _log.info("%s cannot hold the CPU kernels: %s", folder, error)
    with tempfile.TemporaryDirectory() as own:
        return ctypes.CDLL(str(_compile(compiler, level, Path(own), name)))


def _fingerprint(compiler: str, level: Level) -> str:
    """Changes with the source, the flags and the compiler, so that a stale file is never loaded."""
    version = _run(compiler, "--version")
    sources = (file.read_bytes() for file in sorted(_FOLDER.glob("*.[ch]")))
    return digest(b"\0".join((*sources, " ".join(levels.flags(level)).encode(), version.encode())))


def _compile(compiler: str, level: Level, folder: Path, name: str) -> Path:
    """Compile beside the target and rename, so that two processes starting at once cannot disturb each other."""
    _log.info("compiling the CPU kernels for %s, once, into %s", level.name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        built = Path(own) / "decode.so"
        _run(*levels.compile_command(compiler, level, _FOLDER / "decode.c", built))
        return keep(built, folder, name)


def _run(*command: str) -> str:
    """What the command prints. Errors: OSError, or SubprocessError with what it printed in `stderr`."""
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT
    )
    return result.stdout
