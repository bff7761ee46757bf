"""Recording the routing of an engine. Enters: an engine and a file's name. Leaves: LayerLoads, and the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from flexmoe.config.routing import LayerLoad, write_recording
from flexmoe.engine.engine import Engine
from flexmoe.errors import ConfigError, EngineError


class RoutingRecorder:
    """Tells what an engine has counted."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._loads: list[LayerLoad] = []

    def loads(self) -> list[LayerLoad]:
        """How often each expert was chosen, by MoE layer: up to now, or up to the end of the recording."""
        return self._loads if self._engine is None else self._engine.expert_loads()

    def _end(self) -> None:
        self._loads, self._engine = self.loads(), None


@contextlib.contextmanager
def recording(engine: Engine, path: str | PathLike[str] | None = None) -> Iterator[RoutingRecorder]:
    """See `LLM.record_routing`."""
    engine.count_experts(True)
    recorder = RoutingRecorder(engine)
    try:
        if path is not None:
            _check_writable(Path(path))
        yield recorder
        recorder._end()
    except BaseException:
        with contextlib.suppress(EngineError):  # an engine that died cannot be told; why it died is on its way
            engine.count_experts(False)
        raise
    engine.count_experts(False)
    if path is not None:
        write_recording(Path(path), recorder.loads())


def _check_writable(path: Path) -> None:
    """Before anything is computed."""
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(f"the recording {path} cannot be written: {error.strerror}.") from error
