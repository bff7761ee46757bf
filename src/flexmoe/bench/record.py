"""Rows: what was measured, on what, with what. Enters: a device and results. Leaves: JSON, one object a line.

A row of a model has `benchmark`, `engine`, `model`, `params` (what was asked), `config` (how it was set up), `result`,
and what `facts` says: `time`, `commit`, `device`, `versions`. Torch is imported only for a device of torch: a client
of a server, which has none, starts without that wait.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmoe.errors import ConfigError

if TYPE_CHECKING:
    import torch

_SOURCE = Path(__file__).parents[1]
_PACKAGES = ("flexmoe", "torch", "triton", "transformers", "numpy")


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """What all rows of one run share. device: None for what does not compute. commit: None without a git checkout."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no", "--", str(_SOURCE))),
        "device": _machine() if device is None else _gpu(device) if device.type == "cuda" else _cpu(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = (round(float(value), 4) for value in np.percentile(samples, (20, 50, 80)))
    return {"median": median, "p20": p20, "p80": p80}


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to the file, which is made if it is not there. Raises ConfigError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"the rows {path} cannot be written: {error.strerror}.") from error


def _git(*arguments: str) -> str | None:
    """What git says of this code's checkout; None without git, and where it is installed in another's checkout."""
    try:
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=_SOURCE, capture_output=True)
        done = subprocess.run(["git", *arguments], cwd=_SOURCE, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if tracked.returncode == 0 and done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _cpu() -> dict[str, Any]:
    import torch

    return _machine() | {"threads": torch.get_num_threads()}


def _machine() -> dict[str, Any]:
    return {
        "kind": "cpu",
        "name": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
