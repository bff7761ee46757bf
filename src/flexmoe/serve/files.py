"""FlexFlow's JSON files. Enters: paths. Leaves: a configuration, or Requests.

Comments (`//` and `/* */`) are allowed, as in FlexFlow's C++ programs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flexmoe.errors import ConfigError, RequestError
from flexmoe.serve.errors import MissingFileError
from flexmoe.serve.lengths import UNSET
from flexmoe.serve.requests import Request

# A string is matched first, so that slashes inside it are no comment.
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)


def read_json(path: str | Path) -> Any:
    """A JSON file with comments. Raises MissingFileError, an OSError, or ConfigError, a ValueError."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise MissingFileError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        # A comment becomes white space of the same lines, so that an error names the right one.
        return json.loads(_COMMENT.sub(lambda m: m[1] or "\n" * m[0].count("\n") + " ", text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error.msg}, line {error.lineno}, column {error.colno}.") from error


def read_config(path: str | Path) -> dict[str, Any]:
    """A configuration: the keys of `init`, and llm_model, prompt, output_file ... beside them."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a JSON {type(config).__name__}, not an object.")
    return config


def read_prompts(path: str | Path, max_length: int = UNSET) -> list[Request]:
    """Prompts: an array of strings, or a trace {"entries": [{"prompt": ..., "response_length": ...}]}.

    max_length: of each string, prompt and output together; a trace says itself how many tokens it wants.
    """
    found = read_json(path)
    entries = found.get("entries") if isinstance(found, dict) else None
    if isinstance(found, list) and found and all(isinstance(prompt, str) for prompt in found):
        return [Request(prompt=prompt, max_length=max_length) for prompt in found]
    if isinstance(entries, list) and entries and all(_is_entry(entry) for entry in entries):
        return [Request(prompt=e["prompt"], max_new_tokens=e.get("response_length", UNSET)) for e in entries]
    raise RequestError(f'{path} is no list of prompts; it should look like ["One", "Two"].')


def _is_entry(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("prompt"), str)
