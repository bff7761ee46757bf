"""No kernel touches memory that is not its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

_ERRORS = 86  # the exit status by which the sanitizer says that it found some


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_memcheck_finds_nothing() -> None:
    # Each tensor in an allocation of its own: within one that tensors share the sanitizer cannot tell them apart.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # cuda-bindings asks the driver for functions that an older one has not; what fails in earnest is raised.
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no"]
    sanitizer += ["--error-exitcode", str(_ERRORS)]
    done = subprocess.run(
        [*sanitizer, sys.executable, "-m", "tests.gpu.sanitized_run"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "ERROR SUMMARY: 0 errors" in done.stdout
