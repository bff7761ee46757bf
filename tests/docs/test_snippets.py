"""The reader of snippets itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import snippets as module

PAGE = """# Title

See [one](one.md) and ![a picture](a.png).

```python no-run
x = 1
```

````text
```python
not a snippet, [not a link](no.md)
```
````

```console
$ flexmoe generate "a # b"
what it prints
$ make demo  # a comment
```

```bash
# a comment
pip install .
```
[two](two.md#part)
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    return path


def test_blocks_are_found_with_line_and_language(page: Path) -> None:
    found = [(s.language, s.line, s.runs) for s in module.snippets_of(page)]
    assert found == [("python", 6, False), ("text", 10, True), ("console", 16, True), ("bash", 22, True)]


def test_commands_are_told_from_output_and_comments(page: Path) -> None:
    *_, console, bash = module.snippets_of(page)
    assert console.commands() == ['flexmoe generate "a # b"', "make demo  # a comment"]
    assert bash.commands() == ["pip install ."]


def test_links(page: Path) -> None:
    assert module.links(page) == ["one.md", "two.md#part"]
