"""Keep the code small: files at most 400 lines, functions at most 50, median function under 12.

Enters: folders or files of Python (none named: src, tools, benchmarks and training, those that exist). Leaves: a line
`path:line: what is too long` for each offender and exit status 1, or one line of figures and 0.

What counts. A file has as many lines as an editor shows. A function runs from its `def` to its last line, nested
functions included, decorators and its own docstring left out: saying what a function does never costs budget. A
nested function also counts for itself. A function in src/flexmoe/kernels may lift its own limit, never its file's, by a
comment between `def` and the first statement that gives the reason: `# size: why`.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 50
MEDIAN_LINES = 12
FOLDERS = ("src", "tools", "benchmarks", "training")

_LIFT = re.compile(r"#\s*size:\s*\S+")


@dataclass(frozen=True)
class Function:
    """One function: where its `def` stands, how long it is, and whether a comment lifts its limit."""

    path: Path
    line: int
    name: str
    lines: int
    lifted: bool


@dataclass(frozen=True)
class Report:
    """What was measured: the lines of each file, and every function."""

    files: dict[Path, int]
    functions: tuple[Function, ...]

    @property
    def median(self) -> float:
        """Lines of the median function; 0 where there is none."""
        return statistics.median(f.lines for f in self.functions) if self.functions else 0

    @property
    def longest(self) -> int:
        """Lines of the longest function; 0 where there is none."""
        return max((f.lines for f in self.functions), default=0)

    def offenders(self) -> list[str]:
        """One line for each thing over budget; files first."""
        over = [
            f"{path}:{FILE_LINES + 1}: file has {lines} lines; at most {FILE_LINES}"
            for path, lines in self.files.items()
            if lines > FILE_LINES
        ]
        over += [
            f"{f.path}:{f.line}: function {f.name} has {f.lines} lines; at most {FUNCTION_LINES}"
            for f in self.functions
            if f.lines > FUNCTION_LINES and not f.lifted
        ]
        if self.median >= MEDIAN_LINES:
            over.append(f"the median function has {self.median:g} lines; it must have fewer than {MEDIAN_LINES}")
        return over


def python_files(roots: Iterable[Path]) -> list[Path]:
    """All Python files among and below `roots`, sorted. Raises FileNotFoundError for a root that does not exist."""
    found: set[Path] = set()
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"{root} does not exist.")
        found.update(root.rglob("*.py") if root.is_dir() else [root])
    return sorted(found)


def functions_in(path: Path, source: str) -> Iterator[Function]:
    """Every function of one file, nested ones and methods included."""
    lifts = _lifting_lines(source) if "flexmoe/kernels/" in path.as_posix() else frozenset()
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _function(path, node, lifts)


def _function(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef, lifts: frozenset[int]) -> Function:
    last = _last_line(node)
    docstring = _docstring(node)
    spared = _last_line(docstring) - docstring.lineno + 1 if docstring else 0
    statements = node.body[1:] if docstring else node.body
    header = range(node.lineno, statements[0].lineno if statements else last)
    return Function(path, node.lineno, node.name, last - node.lineno + 1 - spared, not lifts.isdisjoint(header))


def _docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt | None:
    return node.body[0] if ast.get_docstring(node, clean=False) is not None else None


def _last_line(node: ast.stmt) -> int:
    assert node.end_lineno is not None  # ast.parse always sets it
    return node.end_lineno


def _lifting_lines(source: str) -> frozenset[int]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return frozenset(t.start[0] for t in tokens if t.type == tokenize.COMMENT and _LIFT.match(t.string))


def measure(roots: Iterable[Path]) -> Report:
    """Measure all Python files among and below `roots`."""
    files: dict[Path, int] = {}
    functions: list[Function] = []
    for path in python_files(roots):
        source = path.read_text(encoding="utf-8")
        files[path] = len(source.splitlines())
        functions += functions_in(path, source)
    return Report(files, tuple(functions))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description="Check the size budget.")
    parser.add_argument("paths", nargs="*", type=Path, help=f"files or folders (default: {', '.join(FOLDERS)})")
    paths: list[Path] = parser.parse_args(arguments).paths
    report = measure(paths or [folder for folder in map(Path, FOLDERS) if folder.exists()])
    offenders = report.offenders()
    for offender in offenders:
        print(offender)
    verdict = f"over budget ({len(offenders)})" if offenders else "within budget"
    print(
        f"Size: {verdict}. {len(report.files)} files, {len(report.functions)} functions; "
        f"median {report.median:g} lines, longest {report.longest}."
    )
    return 1 if offenders else 0


if __name__ == "__main__":
    sys.exit(main())
