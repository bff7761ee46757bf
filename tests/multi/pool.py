"""Ranks that live for the whole test session: starting them takes seconds, what tests do with them does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flexmoe import LLM
from flexmoe.config.engine import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.parallel.launch import spawn
from flexmoe.parallel.supervisor import Supervisor

TIMEOUT = 60.0


class Pool:
    """`size` ranks on gloo, started when they are first needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: Supervisor | None = None

    @property
    def ranks(self) -> Supervisor:
        if self._ranks is None:
            launched = spawn("tests.multi.worker", self.size, TIMEOUT)
            self._ranks = Supervisor(launched, TIMEOUT, str)
        return self._ranks

    def call(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What function(worker, **arguments) returns on each rank."""
        payload = (function.__module__, function.__name__, arguments)
        found = self.ranks.wait(self.ranks.post("call", payload, "testing", owed=range(self.size)))
        return [found[rank] for rank in range(self.size)]

    def llm(self, model: Path, **options: Any) -> LLM:
        """An LLM on these ranks; closing it leaves them."""
        return llm_of(Engine(EngineConfig.from_options({"model": model, **options}), self.ranks))

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()


def llm_of(engine: Engine) -> LLM:
    """The plain face of an engine that was made by hand."""
    with patch("flexmoe.llm.make_engine", return_value=engine):
        return LLM()
