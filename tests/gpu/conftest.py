"""Engines of these tests compile what they need when they need it: they are many, and short-lived."""

from __future__ import annotations

import pytest

from flexmoe.engine import engine
from flexmoe.engine.compile_ahead import CompilingAhead


@pytest.fixture(autouse=True)
def _nothing_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compiling_ahead", lambda *_: CompilingAhead(None))
