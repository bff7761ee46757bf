"""Compiling and loading the C kernels: cached, shared, repaired; and what happens where that cannot be done."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexmoe import LLM, SamplingParams
from flexmoe.kernels.cpu import levels, library
from flexmoe.kernels.cpu.library import Native
from tests.cpu.tiny_models import tiny

GENERATE = """
import json, sys
from flexmoe import LLM, SamplingParams
with LLM(sys.argv[1], threads=1) as llm:
    outputs = llm.generate([[5, 6, 7], [9] * 12], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    print(json.dumps([llm.describe()["decode_kernels"], [output.token_ids for output in outputs]]))
"""
LOAD = "from flexmoe.kernels.cpu import library; print(library.load())"

# Compiles nothing: copies a library compiled before to where -o says.
FAKE = """#!/bin/sh
echo called >> {log}
[ "$1" = --version ] && echo "fake 1.0" && exit 0
while [ "$1" != -o ]; do shift; done
{work}
"""


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The kernels as the machine's own compiler makes them, in its own cache."""
    if library.find_compiler() is None:
        pytest.skip("no C compiler here")
    native = library.load()
    assert native.library is not None, native.reason
    return Path(native.library._name)


@pytest.fixture
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with empty PATH and cache, and nothing loaded yet."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def fake_compiler(tmp_path: Path, work: str, name: str = "cc") -> Path:
    """A compiler that does `work` when it is to write to $2. Leaves: the log, with a line for each call."""
    log = tmp_path / "log"
    script = tmp_path / "bin" / name
    script.write_text(FAKE.format(log=log, work=work).replace("cp ", f"{shutil.which('cp', path='/bin:/usr/bin')} "))
    script.chmod(0o755)
    log.touch()
    return log


def works(native: Native) -> bool:
    return native.reason == "" and native.library is not None and bool(native.library.fm_step)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def run(program: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_a_compiler_torch_serves_the_same_tokens(tmp_path: Path) -> None:
    folder = str(tiny("mixtral"))
    output = run(GENERATE, folder, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    kernels, tokens = json.loads(output.splitlines()[-1])
    assert kernels.startswith("torch (no C compiler found (cc, gcc or clang)")
    assert files(tmp_path) == []
    with LLM(folder, threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        outputs = llm.generate([[5, 6, 7], [9] * 12], params)
        if library.find_compiler() is not None:
            assert llm.describe()["decode_kernels"].startswith("C (")
        assert tokens == [list(output.token_ids) for output in outputs]


@pytest.mark.usefixtures("_machine")
def test_two_processes_compile_at_once(compiled: Path, tmp_path: Path) -> None:
    log = fake_compiler(tmp_path, f'/bin/sleep 0.3; cp {compiled} "$2"')
    command = [sys.executable, "-c", LOAD]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "CDLL" in output
        assert "reason=''" in output
    assert log.read_text().count("called") in (3, 4)  # 4 if both compiled
    assert len(files(tmp_path / "cache")) == 1, "a temporary file was left behind, or the cache is not shared"


@pytest.mark.usefixtures("_machine")
def test_compiled_once_and_found_again(compiled: Path, tmp_path: Path) -> None:
    log = fake_compiler(tmp_path, f'cp {compiled} "$2"')
    assert works(library.load())
    assert works(library.load())
    assert log.read_text().count("called") == 2  # its version, and the work
    assert len(files(tmp_path / "cache")) == 1
    library.load.cache_clear()
    assert works(library.load())
    assert log.read_text().count("called") == 3  # its version


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize("change", ["source", "flags", "compiler", "level"])
def test_anything_new_is_compiled_anew(
    change: str, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, f'cp {compiled} "$2"')
    assert works(library.load())
    if change == "source":
        folder = Path(shutil.copytree(library._FOLDER, tmp_path / "source"))
        (folder / "vector.h").write_text((folder / "vector.h").read_text() + "\n")
        monkeypatch.setattr(library, "_FOLDER", folder)
    elif change == "flags":
        monkeypatch.setattr(levels, "_FLAGS", (*levels._FLAGS, "-O1"))
    elif change == "compiler":
        script = tmp_path / "bin" / "cc"
        script.write_text(script.read_text().replace("fake 1.0", "fake 1.1"))
    else:
        monkeypatch.setattr(levels, "available", lambda: (levels.Level("other"),))
    library.load.cache_clear()
    assert works(library.load())
    assert len(files(tmp_path / "cache")) == 2


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize("length", [0, 10, 1000, -1])
def test_a_damaged_file_in_the_cache_is_replaced(
    length: int, compiled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading a library that is cut short kills the process with a bus error; so it must be noticed before."""
    log = fake_compiler(tmp_path, f'cp {compiled} "$2"')
    assert works(library.load())
    (file,) = (tmp_path / "cache").rglob("*.so")
    damaged = compiled.read_bytes()[:length]
    file.unlink()  # it is loaded in this process: never write into it
    file.write_bytes(damaged)
    library.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert works(library.load())
    assert "is damaged" in caplog.text
    assert file.read_bytes() == compiled.read_bytes()
    assert log.read_text().count("called") == 4


@pytest.mark.usefixtures("_machine")
def test_no_compiler(tmp_path: Path) -> None:
    native = library.load()
    assert native.library is None
    assert native.reason.startswith("no C compiler found (cc, gcc or clang)")


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize("name", ["cc", "gcc", "clang"])
def test_compilers_by_their_names(name: str, compiled: Path, tmp_path: Path) -> None:
    fake_compiler(tmp_path, f'cp {compiled} "$2"', name)
    assert library.find_compiler() == str(tmp_path / "bin" / name)
    assert works(library.load())


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize(
    ("work", "words"),
    [
        ("echo 'decode.c:1: error: no header' >&2; echo more >&2; exit 1", "decode.c:1: error: no header"),
        ("printf 'not UTF-8: \\377\\n' >&2; exit 1", "not UTF-8: "),
        ("exit 1", "exit status 1"),
        ("exit 0", "No such file"),
        ('echo garbage > "$2"', "file too short"),
        ("kill -9 $$", "SIGKILL"),
    ],
)
def test_a_compiler_that_fails_is_a_reason_in_one_line(
    work: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_compiler(tmp_path, work)
    with caplog.at_level(logging.WARNING):
        native = library.load()
    assert native.library is None
    assert native.reason.startswith(f"the C kernels could not be built with {tmp_path / 'bin' / 'cc'}: ")
    assert words in native.reason
    assert "\n" not in native.reason
    assert native.reason in caplog.text, "the whole output is in the log"


@pytest.mark.usefixtures("_machine")
def test_a_compiler_that_cannot_even_say_its_version(tmp_path: Path) -> None:
    (tmp_path / "bin" / "cc").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "bin" / "cc").chmod(0o755)
    assert "exit status 3" in library.load().reason
    library.load.cache_clear()
    (tmp_path / "bin" / "cc").write_bytes(b"\x7fELF but not really")
    assert library.load().reason.startswith("the C kernels could not be built")


@pytest.mark.usefixtures("_machine")
def test_a_compiler_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, "exec /bin/sleep 60")
    monkeypatch.setattr(library, "_TIMEOUT", 0.3)
    start = time.monotonic()
    assert "timed out" in library.load().reason
    assert time.monotonic() - start < 20
    assert files(tmp_path / "cache") == []


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize("why", ["a file in the way", "no home"])
def test_without_a_cache_folder_one_process_has_its_own(
    why: str, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_compiler(tmp_path, f'cp {compiled} "$2"')
    if why == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "cache").write_text("I am no folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert works(library.load())
    assert files(tmp_path / "tmp") == []
    assert log.read_text().count("called") == 2


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert library.cache_folder() == Path("/some/where/flexmoe")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert library.cache_folder() == Path("/home/me/.cache/flexmoe")


@pytest.mark.parametrize("level", levels.of_machine(), ids=lambda level: level.name)
def test_the_kernels_compile_without_a_warning(level: levels.Level, tmp_path: Path) -> None:
    compiler = library.find_compiler()
    if compiler is None:
        pytest.skip("no C compiler here")
    flags = [flag for flag in levels.flags(level) if not flag.startswith("-O")]
    strict = ["-Wall", "-Wextra", "-Wno-unknown-warning-option", "-Wno-psabi", "-Wno-unused-function", "-fsyntax-only"]
    source = str(library._FOLDER / "decode.c")
    result = subprocess.run([compiler, *flags, *strict, source], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""
    assert ctypes.sizeof(ctypes.c_void_p) == 8
