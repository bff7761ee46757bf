"""The compiled C kernels. Enters: decode.c, its headers and a C compiler. Leaves: a library, or why not.

Compiled once for this processor into the user's cache folder, and never at import: the engine asks when it starts.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
# The order of sums is written down in the source and stays: no -ffast-math, which would also change the process.
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-fno-math-errno",
          "-fno-trapping-math")  # fmt: skip
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 120.0  # seconds for the compiler; it takes 2 to 5


@dataclass(frozen=True, slots=True)
class Native:
    """The library, or None and why."""

    library: ctypes.CDLL | None
    reason: str = ""


@functools.cache
def load() -> Native:
    """Load the kernels, compiling them first if this machine has not yet; asked once a process."""
    compiler = find_compiler()
    if compiler is None:
        return Native(None, "no C compiler found (cc, gcc or clang); with one, decoding is about twice as fast")
    try:
        return Native(_open(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        reason = f"the C kernels could not be built with {compiler}: {output or error}"
        _log.warning("%s", reason)
        return Native(None, reason.splitlines()[0])


def find_compiler() -> str | None:
    """The path of the C compiler to use."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: flexmoe in the user's cache folder. None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "flexmoe"
    except RuntimeError:
        return None


def _open(compiler: str) -> ctypes.CDLL:
    """The library from the cache; where there can be none, one compiled for this process alone."""
    name = f"decode-{_fingerprint(compiler)}"
    folder = cache_folder()
    if folder is not None:
        try:
            return ctypes.CDLL(str(_find(folder, name) or _compile(compiler, folder, name)))
        except OSError as error:
            _log.info("%s cannot hold the CPU kernels: %s", folder, error)
    with tempfile.TemporaryDirectory() as own:
        return ctypes.CDLL(str(_compile(compiler, Path(own), name)))


def _find(folder: Path, name: str) -> Path | None:
    """The compiled file NAME-DIGEST.so; one cut short, which would kill the process that loads it, is removed."""
    for file in folder.glob(f"{name}-*.so"):
        if file.stem == f"{name}-{_digest(file.read_bytes())}":
            return file
        _log.warning("%s is damaged and compiled anew", file)
        file.unlink(missing_ok=True)
    return None


def _fingerprint(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor, so that a stale file is never loaded."""
    version = _run(compiler, "--version")
    sources = (file.read_bytes() for file in sorted(_FOLDER.glob("*.[ch]")))
    parts = (*sources, " ".join(_FLAGS).encode(), version.encode(), _processor().encode())
    return _digest(b"\0".join(parts))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, folder: Path, name: str) -> Path:
    """Compile beside the target and rename, so that two processes starting at once cannot disturb each other."""
    _log.info("compiling the CPU kernels for this machine, once, into %s", folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        built = Path(own) / "decode.so"
        _run(compiler, *_FLAGS, str(_FOLDER / "decode.c"), "-o", str(built), "-lm")
        return built.replace(folder / f"{name}-{_digest(built.read_bytes())}.so")


def _run(*command: str) -> str:
    """What the command prints. Errors: OSError, or SubprocessError with what it printed in `stderr`."""
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT
    )
    return result.stdout
