"""Every error a user of FlexMoE can meet.

    FlexMoEError
    ├── ConfigError(ValueError)          an option, or a value in config.json, that cannot be served
    │   ├── UnknownOptionError           an option that does not exist; names the nearest one that does
    │   └── UnsupportedModelError        an architecture or a feature of one that the decoder lacks
    ├── CheckpointError                  the files of a model are missing, damaged or refused
    │   ├── MissingTensorError           a tensor the model needs is in no file
    │   └── TensorShapeError             a tensor has another shape than config.json promises
    ├── RequestError(ValueError)         a prompt or its sampling parameters are refused
    ├── MissingDependencyError           an optional package is not installed; prints the pip line
    └── EngineError(RuntimeError)        the engine was closed or died
        ├── RankError                    one of its processes died or hangs; says which
        ├── EngineDeadError              it died while others used it; the message says of what
        └── RequestFailedError           the engine lives, but one request could not go on

Messages say what was wrong, the value, the limit and the remedy, in that order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlexMoEError(Exception):
    """Root of all errors raised on purpose by FlexMoE."""


class ConfigError(FlexMoEError, ValueError):
    """An option or a configuration value that cannot be served."""


class UnknownOptionError(ConfigError):
    """An option that does not exist."""

    def __init__(self, name: str, known: Iterable[str], where: str) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(names)}."
        super().__init__(f"{where} has no option {name!r}; {hint}")


class UnsupportedModelError(ConfigError):
    """An architecture, or a feature of one, that the decoder does not implement."""


class CheckpointError(FlexMoEError):
    """The files of a model are missing, damaged or refused."""


class MissingTensorError(CheckpointError):
    """A tensor the model needs is in none of the checkpoint's files."""


class TensorShapeError(CheckpointError):
    """A tensor has another shape than config.json promises."""


class RequestError(FlexMoEError, ValueError):
    """A prompt or its sampling parameters are refused."""


class MissingDependencyError(FlexMoEError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'flexmoe[{extra}]'")


class EngineError(FlexMoEError, RuntimeError):
    """The engine was closed or died."""


class RequestFailedError(EngineError):
    """One request could not go on, for a reason of its own; the engine and all others can."""


class EngineDeadError(EngineError):
    """An engine that others use died. The message may hold what only its owner should read."""


class RankError(EngineError):
    """A process of the engine died or hangs, and with it the engine. rank: which; exit_code: None if it hangs."""

    def __init__(self, message: str, rank: int, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.rank, self.exit_code = rank, exit_code
