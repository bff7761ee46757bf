"""The C kernels under the compiler's sanitizers: no access beyond a tensor or a buffer, no race between threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexmoe.kernels.cpu import library
from tests.cpu.tiny_decoders import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER
HERE = Path(__file__).parent
RUN = """
import sys, pytest
from flexmoe.kernels.cpu import levels, library
kind, chosen, *files = sys.argv[1:]
flags = [flag for flag in levels._FLAGS if flag != "-O3"]
levels._FLAGS = (*flags, "-O1", "-fno-omit-frame-pointer", f"-fsanitize={kind}", "-fno-sanitize-recover=all")
assert library.load().library, library.load().reason
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", chosen, *files]))
"""
# What is run, by files and words of their tests. Not what needs transformers: its import takes half a minute here.
CASES = {
    "address,undefined": (
        "test_quantization and (in_c_as_with or alone) or not test_quantization and not family and not again"
        " and not torch and not each_level and not engine",
        [
            "test_native_invariance.py", "test_native_decode.py", "test_native_prompts.py", "test_native_screen.py",
            "test_quantization.py",
        ],
    ),
    "thread": (
        "alone and (dtype0 or odd-None) or any_number",
        ["test_native_invariance.py", "test_native_prompts.py", "test_native_screen.py"],
    ),
}  # fmt: skip
RUNTIMES = {"address,undefined": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}


def runtime(name: str) -> str:
    """Where the compiler keeps a library of its own; just the name if it has none."""
    compiler = library.find_compiler()
    assert compiler is not None
    return library._run(compiler, f"-print-file-name={name}").strip()


@pytest.mark.timeout(600)  # longer than a program below may take
@pytest.mark.parametrize("kind", CASES)
def test_no_complaint(kind: str, tmp_path: Path) -> None:
    log = tmp_path / "complaint"
    environment = {
        **os.environ, "LD_PRELOAD": ":".join(map(runtime, RUNTIMES[kind])), "XDG_CACHE_HOME": str(tmp_path),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}", "UBSAN_OPTIONS": f"log_path={log}",
        "TSAN_OPTIONS": f"log_path={log}",
    }  # fmt: skip

    def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(
            command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    able = python("pass")
    if able.returncode or able.stderr:
        pytest.skip(f"no sanitizer for {kind} here: {able.stderr.strip()}")
    chosen, files = CASES[kind]
    result = python(RUN, kind, chosen, *(str(HERE / name) for name in files))
    complaints = [path.read_text() for path in tmp_path.glob("complaint*")]
    assert (result.returncode, complaints) == (0, []), result.stdout + result.stderr
