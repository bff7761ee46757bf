"""docs/token.md names code: every name must exist, and every stage of `flexmoe trace` must be on the page."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

import pytest

from flexmoe.cli.trace import _STAGES
from tests.docs.snippets import ROOT

PAGE = (ROOT / "docs" / "token.md").read_text(encoding="utf-8")
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
NAMES = [span for span in SPANS if re.fullmatch(r"[a-z_]+(\.\w+)+", span)]
PLACES = [span for span in SPANS if re.fullmatch(r"[\w/]+\.[a-z]+:\w+", span)]


def find(name: str) -> object:
    """The module, class, function, method or field that `name`, without `flexmoe.`, stands for."""
    parts = name.split(".")
    module, rest = importlib.import_module("flexmoe"), parts
    while rest:
        try:
            module = importlib.import_module(f"{module.__name__}.{rest[0]}")
        except ModuleNotFoundError:
            return _member(module, rest)
        rest = rest[1:]
    return module


def _member(owner: object, path: Sequence[str]) -> object:
    for name in path:
        owner = getattr(owner, name)
    return owner


@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_the_page_exists(name: str) -> None:
    assert find(name) is not None


def test_a_name_that_does_not_exist_is_found_out() -> None:
    for wrong in ("engine.engine.Engine.stop", "engine.motor", "nowhere.at.all"):
        with pytest.raises(AttributeError):
            find(wrong)


@pytest.mark.parametrize("place", PLACES)
def test_a_function_in_c_exists(place: str) -> None:
    file, function = place.split(":")
    source = (ROOT / "src" / "flexmoe" / file).read_text(encoding="utf-8")
    assert re.search(rf"^[\w *]+\b{function}\(", source, re.MULTILINE)


def test_the_page_has_names_to_check() -> None:
    """If the patterns found nothing any more, all of the above would pass without a word."""
    assert len(NAMES) > 40
    assert len(PLACES) > 7


@pytest.mark.parametrize("file", sorted({file for *_, file in _STAGES}))
def test_every_stage_of_the_trace_is_on_the_page(file: str) -> None:
    module = file.removesuffix(".py").rstrip("/").replace("/", ".")
    assert any(name.startswith(module + ".") for name in NAMES)
