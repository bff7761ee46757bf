"""Fields of a JSON object that people may write. Enters: the object, a name. Leaves: the value, or ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexmoe.errors import ConfigError


def required(data: Any, name: str) -> Any:
    """The value under a name. Raises ConfigError where it is missing."""
    if not isinstance(data, Mapping) or name not in data:
        raise ConfigError(f"{name!r} is missing.")
    return data[name]


def number(data: Any, name: str, default: float | None = None) -> float:
    """A number from 0. default: where it is missing; None: it must not be."""
    value = data.get(name, default) if default is not None else required(data, name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name}={value!r} is not a number from 0.")
    return float(value)


def positive(data: Any, name: str) -> float:
    """A number above 0."""
    value = number(data, name)
    if not value:
        raise ConfigError(f"{name} is 0; it must be above.")
    return value


def six_digits(value: float) -> float:
    """As many as are written down: more were never measured."""
    return float(f"{value:.6g}")
