"""Files that commands read and write: what is no text, and what cannot be written, is one line and told at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flexmoe.bench.record import append
from flexmoe.cli.main import main
from flexmoe.errors import ConfigError


def flexmoe(*words: str) -> Result:
    return CliRunner().invoke(main, words, catch_exceptions=False)


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--file"),
        ("serve", "--api-key-file"),
        ("serve", "--compare", "http://127.0.0.1:9/v1", "--compare-key-file"),
        ("simulate", "--machine", "cpu2", "--measured"),
        ("report", "--rows"),
    ],
    ids=" ".join,
)
def test_a_file_that_is_no_text_is_told_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xc0\xff\x00")
    done = flexmoe(*words, str(file))
    assert done.exit_code == 1
    assert f"{file} is not text in UTF-8" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "latency", "--out"),
        ("bench", "machine", "--out"),
        ("bench", "suite", "--out"),
        ("bench", "throughput", "--out"),
        ("profile", "--trace"),
        ("simulate", "--machine", "cpu2", "--out"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    done = flexmoe(*words, str(tmp_path / "file" / "rows.jsonl"))
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def test_the_folder_of_an_output_is_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "points.jsonl"
    assert flexmoe("simulate", "--machine", "cpu2", "--num-requests", "3", "--out", str(out)).exit_code == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1


def test_a_row_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        append(tmp_path, {})
