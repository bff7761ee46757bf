"""What README and docs promise is so: snippets run, commands exist, links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexmoe.models.families import FAMILIES
from tests.docs.snippets import ROOT, Snippet, links, pages, snippets

BASH = [(s, command) for s in snippets("bash", "console") for command in s.commands()]
FLEXMOE = [(s, command) for s, command in BASH if command.startswith("flexmoe ") and s.runs]
CURL = [(s, command) for s, command in BASH if command.startswith("curl ")]
OTHERS = [(s, command) for s, command in BASH if not command.startswith(("flexmoe ", "curl "))]
PYTHON = snippets("python")
SERVER = [s for s in PYTHON if "server" in s.info]
ADDRESS = "127.0.0.1:8000"

needs_cli = pytest.mark.skipif(importlib.util.find_spec("flexmoe.cli") is None, reason="no command line yet")


def ids(cases: list[tuple[Snippet, str]] | list[Snippet]) -> list[str]:
    pairs = [case if isinstance(case, tuple) else (case, "") for case in cases]
    return [f"{snippet.page}:{snippet.line} {command}".rstrip() for snippet, command in pairs]


@contextmanager
def one_processor() -> Iterator[None]:
    """For what is started within: an engine's usual threads wait without sleeping, and other tests run beside."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(all_of_them)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def run(command: list[str] | str, folder: Path) -> str:
    """What it prints, run as a user in an empty folder would, with this environment's programs first on the path."""
    programs = Path(sys.executable).parent
    with one_processor():
        result = subprocess.run(
            command,
            shell=isinstance(command, str),
            cwd=folder,
            env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("snippet", [s for s in PYTHON if s.runs], ids=ids([s for s in PYTHON if s.runs]))
def test_python_snippet_runs(snippet: Snippet, tmp_path: Path) -> None:
    run([sys.executable, "-W", "error", "-c", snippet.text], tmp_path)


@pytest.mark.parametrize("snippet", PYTHON, ids=ids(PYTHON))
def test_python_snippet_compiles(snippet: Snippet) -> None:
    compile(snippet.text, f"{snippet.page}:{snippet.line}", "exec")


@pytest.fixture(scope="module")
def here() -> Iterator[str]:
    """Where a server answers, in place of the address on the pages."""
    pytest.importorskip("fastapi")
    from tests.server.serving import running

    with running() as server:
        yield server.url.removeprefix("http://")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(("snippet", "command"), CURL, ids=ids(CURL))
def test_curl_command_gets_an_answer(snippet: Snippet, command: str, here: str, tmp_path: Path) -> None:
    assert ADDRESS in command
    answer = run(command.replace(ADDRESS, here), tmp_path)
    assert answer
    assert '"error"' not in answer


@pytest.mark.parametrize("snippet", SERVER, ids=ids(SERVER))
def test_snippet_of_a_client_runs(snippet: Snippet, here: str, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    assert ADDRESS in snippet.text
    assert run([sys.executable, "-W", "error", "-c", snippet.text.replace(ADDRESS, here)], tmp_path)


@needs_cli
@pytest.mark.parametrize(("snippet", "command"), FLEXMOE, ids=ids(FLEXMOE))
def test_flexmoe_command_runs(snippet: Snippet, command: str, tmp_path: Path) -> None:
    run(command, tmp_path)


@pytest.mark.parametrize(("snippet", "command"), OTHERS, ids=ids(OTHERS))
def test_other_command_can_be_run(snippet: Snippet, command: str) -> None:
    """Not run, but looked at: `make` targets and pip extras are real. A command of another kind needs a check here."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {a for a in arguments if "=" not in a} <= targets
    else:
        assert [program, *arguments[:1]] == ["pip", "install"]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[([a-z,]+)\]", command)
        assert {extra for group in extras for extra in group.split(",")} <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    local = [link.split("#")[0] for link in links(page) if "://" not in link and not link.startswith("#")]
    assert [link for link in local if not (page.parent / link).exists()] == []


@needs_cli
def test_the_page_of_the_command_line_is_current() -> None:
    run([sys.executable, "tools/cli_help.py", "--check"], ROOT)


def test_readme_names_every_family() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in readme] == []


def test_readme_shows_both_faces() -> None:
    """If the snippets were not found any more, all of the above would pass without a word."""
    readme = [s for s in PYTHON if s.page == "README.md"]
    commands = [command for s, command in BASH if s.page == "README.md"]
    assert any(s.runs and "LLM(" in s.text for s in readme)
    assert SERVER
    assert commands[0].startswith("make serve")
    for promised in ("make test", "pip install", "flexmoe generate", "curl"):
        assert any(command.startswith(promised) for command in commands), promised
