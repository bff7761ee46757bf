"""The exception tree is the one its docstring draws, and each message names the remedy."""

from __future__ import annotations

import inspect
import re

import pytest

from flexmoe import errors

# "    │   ├── UnknownOptionError(ValueError)   what it means": depth, name, other base, meaning
LINE = re.compile(r"^ {4}((?:[│ ]   )*)(?:[├└]── )?(\w+)(?:\((\w+)\))?(?: {2,}(\S.*))?$")
CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Exception) and kind.__module__ == errors.__name__
}


def drawn() -> dict[str, tuple[str, ...]]:
    """Each class of the docstring's drawing with its bases, the parent in the drawing first."""
    tree: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if not line.startswith("    "):
            continue
        match = LINE.match(line)
        assert match is not None, line
        indent, name, base, meaning = match.groups()
        depth = len(indent) // 4 + ("── " in line)
        assert meaning or depth == 0, f"{name} is drawn without its meaning"
        path[depth:] = [name]
        parent = path[depth - 1] if depth else "Exception"
        tree[name] = (parent, base) if base else (parent,)
    return tree


def test_the_docstring_draws_the_real_tree() -> None:
    real = {name: tuple(base.__name__ for base in kind.__bases__) for name, kind in CLASSES.items()}
    assert drawn() == real
    assert len(real) > 8


def test_everything_is_caught_by_the_root() -> None:
    assert [name for name, kind in CLASSES.items() if not issubclass(kind, errors.FlexMoEError)] == []


def test_every_class_says_what_it_is() -> None:
    assert [name for name, kind in CLASSES.items() if not kind.__doc__] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_token", "Thing has no option 'max_token'; did you mean 'max_tokens'?"),
        ("zzz", "Thing has no option 'zzz'; known options: max_tokens, top_k, top_p."),
    ],
)
def test_an_unknown_option_names_the_nearest_or_all(name: str, message: str) -> None:
    assert str(errors.UnknownOptionError(name, ["top_p", "top_k", "max_tokens"], "Thing")) == message


def test_a_missing_package_comes_with_the_pip_line() -> None:
    message = str(errors.MissingDependencyError("fastapi", "server", "flexmoe serve"))
    assert message == "flexmoe serve needs the package 'fastapi': pip install 'flexmoe[server]'"
