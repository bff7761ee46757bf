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
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        return Native(None, "no C compiler found (cc, gcc or clang); with one, decoding is about twice as fast")
    try:
        file = cache_folder() / f"decode-{_fingerprint(compiler)}.so"
        if not file.is_file():
            _compile(compiler, file)
        return Native(ctypes.CDLL(str(file)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        reason = f"the C kernels could not be built with {compiler}: {output or error}"
        _log.warning("%s", reason)
        return Native(None, reason.splitlines()[0])


def cache_folder() -> Path:
    """Where compiled kernels are kept: flexmoe in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flexmoe"


def _fingerprint(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor, so that a stale file is never loaded."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT).stdout
    sources = (file.read_bytes() for file in sorted(_FOLDER.glob("*.[ch]")))
    parts = (*sources, " ".join(_FLAGS).encode(), version, _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, target: Path) -> None:
    """Compile next to the target and rename, so that two processes starting at once cannot disturb each other."""
    _log.info("compiling the CPU kernels for this machine, once: %s", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [compiler, *_FLAGS, str(_FOLDER / "decode.c"), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
        built.replace(target)
