"""`flexflow` as modules, for scripts that import it by that name. Enters: nothing. Leaves: entries in sys.modules.

For one process and only when asked: `flexmoe run` does. Nothing is installed, and no file is written.
"""

from __future__ import annotations

import importlib.util
import sys
from enum import Enum
from types import ModuleType

import flexmoe.serve as face

# What a script may import of FlexFlow, all of it with the same names: FlexFlow's own packages star-import each other.
_MODULES = ("flexflow", "flexflow.core", "flexflow.type", "flexflow.serve", "flexflow.serve.serve")


def installed_flexflow() -> str | None:
    """Where a real FlexFlow is, if one is installed."""
    if isinstance(sys.modules.get("flexflow"), _Shim):
        return None
    try:
        spec = importlib.util.find_spec("flexflow")
    except ValueError:  # a module without a spec stands in its place
        return None
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), "somewhere")


def provide() -> None:
    """Make `import flexflow.serve` and its neighbours give flexmoe.serve in this process. May be called twice."""
    names = {name: getattr(face, name) for name in face.__all__}
    made = {name: _Shim(name) for name in _MODULES}
    for name, module in made.items():
        module.__dict__.update(names)
        module.__all__ = list(names)
        if name.endswith(".type"):
            module.__dict__.update({"enum_to_int": _enum_to_int, "int_to_enum": _int_to_enum})
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    sys.modules.update(made)


class _Shim(ModuleType):
    """A module of FlexFlow's name that holds flexmoe.serve's. A name it lacks is answered with the page to read."""

    __all__: list[str]

    def __init__(self, name: str) -> None:
        super().__init__(name, face.__doc__)
        self.__path__: list[str] = []  # a package, so that `import flexflow.serve` works

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"{self.__name__} has no {name!r} in FlexMoE; docs/flexflow.md lists what is there.")


def _enum_to_int(kind: type[Enum], item: Enum) -> int:
    return int(kind(item).value)


def _int_to_enum(kind: type[Enum], value: int) -> Enum:
    return kind(value)
