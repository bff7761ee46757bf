"""Rows: what was measured, on what, with what. Leaves: one JSON line each."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16")
_PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "safetensors")


def facts(model: Path, threads: int) -> dict[str, Any]:
    """What all rows of one run share."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks")),
        "device": _device(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "threads": threads,
        "model": _model(model),
    }


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and the samples themselves."""
    p20, median, p80 = (round(float(value), 4) for value in np.percentile(samples, (20, 50, 80)))
    return {"median": median, "p20": p20, "p80": p80, "samples": [round(float(sample), 4) for sample in samples]}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to the file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    info = _cpuinfo()
    present = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in present],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _model(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_local_experts", "num_experts", "vocab_size")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    shape = {name: config[name] for name in names if name in config}
    return {"name": folder.name, "checkpoint_mb": round(weights / 2**20, 1), **shape}
