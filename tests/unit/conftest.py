"""Unit tests need no torch, and get none: importing it, or what stands on it, fails here."""

from __future__ import annotations

import sys

import pytest

HEAVY = ("torch", "triton", "transformers")


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in sys.modules makes `import torch` raise, even if another test imported it before."""
    for name in HEAVY:
        monkeypatch.setitem(sys.modules, name, None)
