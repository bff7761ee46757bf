"""Compiled kernels in the user's cache folder. Enters: what a file is compiled from. Leaves: the file, unless damaged.

A file is named NAME-DIGEST.SUFFIX, by the digest of its own content: one that was cut short is never used.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: flexmoe in the user's cache folder. None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "flexmoe"
    except RuntimeError:
        return None


def digest(content: bytes) -> str:
    """Enough of it to tell two apart."""
    return hashlib.sha256(content).hexdigest()[:16]


def find(folder: Path, name: str, suffix: str) -> Path | None:
    """The file of that name; damaged ones, which would kill the process that loads them, are removed."""
    for file in folder.glob(f"{name}-*.{suffix}"):
        if file.stem == f"{name}-{digest(file.read_bytes())}":
            return file
        _log.warning("%s is damaged and compiled anew", file)
        file.unlink(missing_ok=True)
    return None


def keep(built: Path, folder: Path, name: str) -> Path:
    """Move a file, built on the same disk, to its place: whole or not at all, whoever does so at the same time."""
    return built.replace(folder / f"{name}-{digest(built.read_bytes())}{built.suffix}")
