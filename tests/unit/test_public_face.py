"""The package's face: what `import flexmoe` offers, and that it waits for nothing heavy."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import flexmoe
from flexmoe import errors

IMPORT = """
import sys, flexmoe
heavy = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "rich", "click"}
assert flexmoe.SamplingParams(max_tokens=1).max_tokens == 1
print(*sorted(heavy & sys.modules.keys()))
"""


def test_all_is_sorted_and_complete() -> None:
    kinds = inspect.getmembers(errors, inspect.isclass)
    raised = {name for name, kind in kinds if issubclass(kind, errors.FlexMoEError)}
    others = {"LLM", "SamplingParams", "RequestOutput", "CompletionOutput", "__version__"}
    assert set(flexmoe.__all__) == raised | others
    constants_first = sorted(flexmoe.__all__, key=lambda name: (not name.isupper(), name))
    assert flexmoe.__all__ == constants_first  # the order ruff keeps


def test_what_is_imported_lazily_is_listed_and_typed() -> None:
    assert set(flexmoe._LAZY) <= set(flexmoe.__all__)
    assert set(flexmoe.__all__) - set(flexmoe._LAZY) <= set(vars(flexmoe))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'flexmoe' has no attribute 'LMM'"):
        flexmoe.LMM  # noqa: B018


def test_import_waits_for_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == ""
