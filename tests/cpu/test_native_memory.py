"""The C kernels under the address and undefined-behaviour sanitizers: no access beyond a tensor or a buffer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexmoe.kernels.cpu import library
from tests.cpu.tiny_decoders import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER
ROOT = Path(__file__).parents[2]
# Tests that need no transformers, whose import takes minutes under a sanitizer.
TESTS = ["test_native_invariance.py", "test_native_decode.py"]
RUN = """
import sys, pytest
from flexmoe.kernels.cpu import library
sanitize = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
library._FLAGS = (*(flag for flag in library._FLAGS if flag != "-O3"), *sanitize)
assert library.load().library, library.load().reason
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not family and not again", *sys.argv[1:]]))
"""


def runtime(name: str) -> str:
    """Where the compiler keeps a library of its own; just the name if it has none."""
    compiler = library.find_compiler()
    assert compiler is not None
    return library._run(compiler, f"-print-file-name={name}").strip()


def test_no_access_out_of_bounds(tmp_path: Path) -> None:
    preload = [runtime("libasan.so"), runtime("libubsan.so")]
    if not all(Path(path).is_absolute() for path in preload):
        pytest.skip(f"the compiler has no sanitizers: {preload}")
    log = tmp_path / "sanitizer"
    environment = {
        **os.environ, "LD_PRELOAD": ":".join(preload), "XDG_CACHE_HOME": str(tmp_path),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}", "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
    }  # fmt: skip
    command = [sys.executable, "-c", RUN, *(str(Path(__file__).with_name(name)) for name in TESTS)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    reports = [path.read_text() for path in tmp_path.glob("sanitizer*")]
    assert (result.returncode, reports) == (0, []), result.stdout + result.stderr
