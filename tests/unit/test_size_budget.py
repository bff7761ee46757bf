"""The size budget: what it counts, what it lets pass, what it reports."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tools import size_budget
from tools.size_budget import FILE_LINES, FUNCTION_LINES, MEDIAN_LINES, Function, functions_in, main, measure


def function(lines: int, name: str = "f", header: str = "") -> str:
    """Source of a function of `lines` lines; `header` follows the colon of its def."""
    return f"def {name}():{header}\n" + "    x = 1\n" * (lines - 1)


def small(count: int) -> str:
    return "".join(function(2, f"small{i}") for i in range(count))


def write(root: Path, name: str, source: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def only(source: str, path: str = "a.py") -> Function:
    (found,) = functions_in(Path(path), textwrap.dedent(source))
    return found


def test_all_within_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a.py", function(FUNCTION_LINES) + small(3))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "Size: within budget. 1 files, 4 functions; median 2 lines, longest 50.\n"


def test_long_function_is_reported_with_path_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "a.py", small(3) + function(FUNCTION_LINES + 1, "big"))
    assert main([str(tmp_path)]) == 1
    assert f"{path}:7: function big has 51 lines; at most 50\n" in capsys.readouterr().out


def test_long_file_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "fits.py", "x = 1\n" * FILE_LINES)
    path = write(tmp_path, "long.py", "x = 1\n" * (FILE_LINES + 1))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"{path}:401: file has 401 lines; at most 400"


def test_median_must_stay_below_its_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "a.py", function(MEDIAN_LINES - 1))
    assert measure([path]).offenders() == []
    path.write_text(function(MEDIAN_LINES))
    assert measure([path]).offenders() == ["the median function has 12 lines; it must have fewer than 12"]


def test_docstring_and_decorators_do_not_count() -> None:
    found = only('''
        @decorated(
            1,
        )
        def f(
            a,
        ):
            """One

            two.
            """
            return a
        ''')
    assert (found.line, found.lines) == (5, 4)


def test_function_of_only_a_docstring() -> None:
    assert only('def f():\n    """Says."""\n').lines == 1


def test_methods_async_and_nested_functions_count() -> None:
    source = "class A:\n    async def outer(self):\n        def inner():\n            pass\n        return inner\n"
    assert [(f.name, f.lines) for f in functions_in(Path("a.py"), source)] == [("outer", 4), ("inner", 2)]


@pytest.mark.parametrize(
    "header",
    ["  # size: the tile loop reads as one", "\n    # size: why not", '\n    """Says."""\n    # size: why not'],
    ids=["on the def line", "below it", "below the docstring"],
)
def test_a_reason_lifts_the_limit_of_a_kernel(header: str) -> None:
    assert only(function(60, header=header), "src/flexmoe/kernels/triton/a.py").lifted


@pytest.mark.parametrize(
    ("path", "header"),
    [
        ("src/flexmoe/kernels/a.py", "  # size:"),
        ("src/flexmoe/kernels/a.py", "  # long, sorry"),
        ("src/flexmoe/kernels/a.py", '\n    x = "# size: in a string"'),
        ("src/flexmoe/kernels/a.py", "\n    x = 2\n    # size: too late, inside the body"),
        ("src/flexmoe/moe/a.py", "  # size: not a kernel"),
        ("benchmarks/kernels/a.py", "  # size: not a kernel"),
    ],
)
def test_nothing_else_lifts_it(path: str, header: str) -> None:
    assert not only(function(60, header=header), path).lifted


def test_a_lifted_kernel_does_not_lift_its_neighbour_or_file(tmp_path: Path) -> None:
    source = function(60, "kernel", "  # size: why") + function(60, "launch") + small(200)
    path = write(tmp_path, "src/flexmoe/kernels/a.py", source)
    assert measure([path]).offenders() == [
        f"{path}:401: file has 520 lines; at most 400",
        f"{path}:61: function launch has 60 lines; at most 50",
    ]


def test_without_arguments_the_folders_that_exist_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (size_budget.FOLDERS[0], "tests"):
        write(tmp_path, f"{folder}/a.py", function(FUNCTION_LINES + 1))
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "src/a.py:1: function f has 51 lines" in out
    assert "tests/a.py" not in out


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        measure([tmp_path / "nowhere"])
